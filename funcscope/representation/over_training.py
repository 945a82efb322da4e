"""How a model's residual streams come to be what they are at the end: similarity of checkpoints to the last one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.keys import Key, check_key, fold_in
from ..core.layout import Params
from ..core.objective import Loss
from ..core.result import Result, quantity
from ..core.tables import counted
from .calibration import LEAST, calibration_notes
from .layer_similarity import MEASURES, layer_similarity
from .of_layers import stream_sample


class SimilarityToLast(Result):
    """Similarity of every checkpoint's residual streams to the same ones of the last checkpoint, beside the null."""

    calibrated: Float[Tensor, "s l"] = quantity(
        "similarity to the last checkpoint above the null", per=("step", "layer"), stderr="calibrated_stderr"
    )
    calibrated_stderr: Float[Tensor, "s l"]
    similarity: Float[Tensor, "s l"] = quantity(
        "similarity to the last checkpoint", per=("step", "layer"), stderr="similarity_stderr"
    )
    similarity_stderr: Float[Tensor, "s l"]
    null_quantile: Float[Tensor, "s l"] = quantity("95 % point of the null", per=("step", "layer"))
    p_value: Float[Tensor, "s l"] = quantity("p value", per=("step", "layer"))
    steps: list[int]
    layers: tuple[str, ...]
    measure: str
    num_sequences: int
    key: Key

    @property
    def coords(self) -> Mapping[str, Sequence[Any]]:
        return {"step": self.steps, "layer": self.layers}

    @property
    def head(self) -> str:
        over = f"{counted(self.num_sequences, 'sequence')}"
        return f"{self.measure} of {counted(len(self.steps), 'checkpoint')} with the last one, over {over}"

    @property
    def notes(self) -> list[str]:
        return calibration_notes(self.num_sequences, 1, 0, not bool(self.similarity.isfinite().all()))


def similarity_to_last(
    loss: Loss, thetas: Iterable[Float[Tensor, " p"]], steps: Sequence[int], *, key: Key, size: int = 1024, num: int = 199,
    measure: Literal["debiased_cka", "cka", "cca", "procrustes", "neighbours"] = "debiased_cka",
    sites: Sequence[str] | None = None,
) -> SimilarityToLast:  # fmt: skip
    """How alike each checkpoint's residual streams are to those of the last one: at which step a layer is what it will be.

    `layer_similarity` of the same layer at two checkpoints, over the same positions of the same texts, one of each sequence;
    calibrated by the permutation null, which is the same for all steps. The last checkpoint has 1. Errors are over
    sequences.

    loss: of the network that all have. thetas: parameters by step. size: positions that are sampled. num: permutations.
    sites: others than the residual streams, `module:NAME` of any network among them.

    Raises ValueError for models that are not described, for fewer than two checkpoints, and as `layer_similarity`.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(40).view(10, 4) % 9], fs.causal_lm)
    >>> found = similarity_to_last(loss, [net.theta.flip(0), net.theta], [0, 1], key=fs.key(0), num=19)
    >>> found.similarity.shape, round(float(found.similarity[1].min()), 6)
    (torch.Size([2, 2]), 1.0)
    """
    check_key(key)
    check_choice("measure", measure, MEASURES)
    check_count("num", num, LEAST)
    points = list(thetas)
    if len(points) < 2 or len(points) != len(steps):
        raise ValueError(
            f"`thetas` must be of two checkpoints or more, with a step each, got {len(points)} and {len(steps)} steps."
        )

    def streams(theta: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        params: Params = loss.net.layout.unravel(theta)
        kept = stream_sample(loss, params, key=fold_in(key, "positions"), size=size, sites=sites)
        return dict(kept.rows), kept.sequence

    last, groups = streams(points[-1])
    columns: dict[str, list[Tensor]] = {}
    num_sequences = 0
    for theta in points:
        layers, _ = streams(theta)
        rows: dict[str, list[Tensor]] = {}
        for name, own in layers.items():
            made = layer_similarity(
                {name: own}, {name: last[name]}, groups, key=fold_in(key, "null"), measure=measure, num=num, per_sequence=1,
            )  # fmt: skip
            num_sequences = made.num_sequences
            for field in (
                "similarity",
                "similarity_stderr",
                "calibrated",
                "calibrated_stderr",
                "null_quantile",
                "p_value",
            ):
                rows.setdefault(field, []).append(getattr(made, field)[0, 0])
        for field, each in rows.items():
            columns.setdefault(field, []).append(torch.stack(each))
    stacked = {field: torch.stack(each).double() for field, each in columns.items()}
    return SimilarityToLast(
        **stacked, steps=list(steps), layers=tuple(last), measure=measure, num_sequences=num_sequences, key=key
    )
