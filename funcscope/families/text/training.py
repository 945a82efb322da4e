"""Trains the three models one after the other, or goes on where an interrupted call stopped, or finds them there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from ...core.checks import check_choice, check_count
from ...core.criterion import IGNORE
from ...core.keys import Key, fold_in, key, uniform
from ...core.store import Damaged, write
from ...core.store import load as load_stored
from ...core.store import save as save_stored
from ..threads import one_thread
from .model import END, WEIGHTS, load, make, place, save, spelled
from .texts import data, read
from .variants import BASE, KINDS, NAMES, Config

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MOMENTS = ("exp_avg", "exp_avg_sq")
EVERY = 50
"""Steps between two points, and between two states from which an interrupted training goes on."""
RECORD = "training.json"
STATE = "training.safetensors"
SCORED = 128
"""Held-out texts of each kind that the losses are of."""


class Point(NamedTuple):
    """How far it is: which model, after how many of its steps, and the mean training loss of the batch in nats per byte."""

    model: str
    step: int
    loss: float


def train(config: Config, folder: Path) -> Iterator[Point]:
    """Make the texts and the models `base`, `prose` and `code` in `folder`; yields points while it trains.

    The base is trained on windows of both kinds of text, half of each, the other two go on from it on their own. AdamW, a
    linear warm-up and a cosine to zero, gradients clipped at norm 1. A model that is there is reused; one that is not
    finished goes on from the last state that was kept, with the same bits as an uninterrupted run on the same machine. It
    computes on one thread, so that the bits do not depend on how many there are.

    Raises ValueError where the folder is of another configuration or of other texts, Damaged for files that were changed.
    """
    files = data(config, folder)
    sums = {f"{split}/{kind}": _sum(path) for split, of in files.items() for kind, path in of.items()}
    streams = {kind: _stream(read(files["train"][kind])) for kind in KINDS}
    heldout = {kind: _rows(read(files["heldout"][kind])[:SCORED], config.length) for kind in KINDS}
    for name in NAMES:
        about = {"config": json.loads(json.dumps(asdict(config))), "texts": sums, "model": name}
        if name != BASE:
            about["base"] = _sum(folder / BASE / WEIGHTS)
        if not _finished(folder / name, about):
            yield from _trained(name, config, folder, about, streams, heldout)
        (folder / name / STATE).unlink(missing_ok=True)


def losses(folder: Path) -> dict[str, dict[str, float]]:
    """Of every model, the mean loss on the first held-out texts of each kind, in nats per byte, as it was after training."""
    return {name: json.loads((folder / name / RECORD).read_text())["heldout_nats_per_byte"] for name in NAMES}


def windows(name: str, config: Config, folder: Path, num: int) -> list[str]:
    """Random ones of the windows of text that a model was trained on: `num`, or all where there are fewer.

    Drawn by the configuration's seed from all rows of all its steps, and read from the texts in `folder`. Those that begin or
    end inside a character, which no text does, are passed over.
    """
    check_choice("name", name, NAMES)
    check_count("num", num)
    streams = [_stream(read(folder / "train" / f"{kind}.jsonl")) for kind in _kinds(name)]
    root, rows = _root(name, config), len(streams) * -(-config.batch_size // len(streams))
    chance = uniform(fold_in(root, "windows"), torch.empty(steps_of(name, config) * rows, dtype=torch.float64))
    texts = list[str]()
    for at in chance.argsort(stable=True).tolist():
        step, row = divmod(at, rows)
        text = spelled(_batch(fold_in(root, step + 1), streams, config)[row].tolist())
        texts += [] if text is None else [text]
        if len(texts) == num:
            break
    return texts


def steps_of(name: str, config: Config) -> int:
    return config.steps if name == BASE else config.tuning_steps


def _trained(
    name: str,
    config: Config,
    folder: Path,
    about: Mapping[str, Any],
    streams: Mapping[str, Tensor],
    heldout: Mapping[str, Tensor],
) -> Iterator[Point]:
    """One model from its start, or from the state that was kept."""
    model, path = make(config), folder / name / STATE
    if name != BASE:
        place(model, load(folder / BASE))
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    for param in model.parameters():
        optimiser.state[param] = {"step": torch.tensor(0.0)} | {moment: torch.zeros_like(param) for moment in MOMENTS}
    begun = _restore(model, optimiser, path, about) if path.exists() else 0
    root, kinds = _root(name, config), _kinds(name)
    for step in range(begun + 1, steps_of(name, config) + 1):
        rows = _batch(fold_in(root, step), [streams[kind] for kind in kinds], config)
        loss = _step(model, optimiser, rows, _rate(step, name, config))
        if step % EVERY == 0 or step == steps_of(name, config):
            save_stored(path, _stored(model, optimiser), {**about, "step": step}, copy=False)
            yield Point(name, step, loss)
    save(folder / name, model)
    scores = {kind: _score(model, rows, config.batch_size) for kind, rows in heldout.items()}
    record = {**about, "weights": _sum(folder / name / WEIGHTS), "heldout_nats_per_byte": scores}
    write(folder / name / RECORD, json.dumps(record, indent=1).encode())


@one_thread()
def _step(model: LlamaForCausalLM, optimiser: torch.optim.Optimizer, rows: Tensor, rate: float) -> float:
    optimiser.param_groups[0]["lr"] = rate
    optimiser.zero_grad()
    loss = _nats(model, rows) / rows[:, 1:].numel()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


def _nats(model: LlamaForCausalLM, rows: Int[Tensor, "b t"]) -> Tensor:
    """The summed cross-entropy of every token given those before it; padding, on the right, is seen by none of them."""
    logits = model(input_ids=rows.clamp_min(0), use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


@one_thread()
@torch.no_grad()
def _score(model: LlamaForCausalLM, rows: Int[Tensor, "n t"], batch_size: int) -> float:
    """Nats per byte of texts: every byte but the first of each counts once."""
    total = sum(float(_nats(model, part)) for part in rows.split(batch_size))
    return total / int((rows[:, 1:] != IGNORE).sum())


def _root(name: str, config: Config) -> Key:
    """Of the batches of a model, a child for each step, which counts from 1."""
    return fold_in(fold_in(key(config.seed), "batches"), name)


def _kinds(name: str) -> tuple[str, ...]:
    """What a model is trained on."""
    return KINDS if name == BASE else (name,)


def _rate(step: int, name: str, config: Config) -> float:
    num, peak = steps_of(name, config), config.learning_rate if name == BASE else config.tuning_rate
    return peak * min(1.0, step / max(1.0, num / 10)) * 0.5 * (1 + math.cos(math.pi * (step - 1) / num))


def _batch(root: Key, streams: list[Tensor], config: Config) -> Int[Tensor, "b t"]:
    """Windows at uniform places, from each stream the same number."""
    each = -(-config.batch_size // len(streams))
    rows = []
    for i, stream in enumerate(streams):
        room = len(stream) - config.length + 1
        starts = (uniform(fold_in(root, i), torch.empty(each, dtype=torch.float64)) * room).long().clamp_max(room - 1)
        rows.append(stream[starts[:, None] + torch.arange(config.length)].long())
    return torch.cat(rows)


def _stream(texts: list[str]) -> Int[Tensor, " n"]:
    """All texts in one row, each with its end."""
    return torch.tensor([token for text in texts for token in (*text.encode(), END)], dtype=torch.int16)


def _rows(texts: list[str], length: int) -> Int[Tensor, "n t"]:
    """A text per row, cut to `length` bytes, and padded with what is not scored."""
    rows = [[*text.encode()][:length] for text in texts]
    return torch.tensor([row + [IGNORE] * (length - len(row)) for row in rows])


def _stored(model: LlamaForCausalLM, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    of = {name: {"param": param, **optimiser.state[param]} for name, param in model.named_parameters()}
    return {f"{kind}.{name}": values[kind] for name, values in of.items() for kind in ("param", *MOMENTS)}


@torch.no_grad()
def _restore(model: LlamaForCausalLM, optimiser: torch.optim.Optimizer, path: Path, about: Mapping[str, Any]) -> int:
    """The state that was kept, and its step."""
    arrays, meta, _ = load_stored(path)
    _check_same(path, meta, about)
    for name, value in _stored(model, optimiser).items():
        value.copy_(arrays[name])
    for state in optimiser.state.values():
        state["step"].fill_(meta["step"])
    return meta["step"]


def _finished(folder: Path, about: Mapping[str, Any]) -> bool:
    """Whether the model is there, whole, and of this configuration and these texts."""
    path = folder / RECORD
    if not path.is_file():
        return False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["weights"]
    except (ValueError, KeyError, TypeError) as err:
        raise Damaged(f"{path} is damaged ({err}): delete the folder {folder} to have the model made again.") from err
    _check_same(path, record, about)
    if not (folder / WEIGHTS).is_file() or _sum(folder / WEIGHTS) != known:
        raise Damaged(
            f"{folder / WEIGHTS} is not as it was after training: delete the folder {folder} to have it made again."
        )
    return True


def _check_same(path: Path, stored: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    if odd := [name for name in about if stored.get(name) != about[name]]:
        names = {"config": "another configuration", "texts": "other texts", "base": "another base model"}
        what = names.get(odd[0], "another model")
        raise ValueError(f"{path} is of {what}: choose a new folder, or delete {path.parent} to have it made again.")


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
