"""Where subjects come from: a model's folder, a checkpoint of a family, losses in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..core.checks import check_params
from ..core.objective import Loss
from ..core.running import held_statistics
from ..families.family import SPLITS, family
from . import digest
from .adapter import base_of, is_adapter, weights_of
from .dataset import ENDINGS, digest_of, is_dataset
from .digest import Sums
from .folder import ADAPTER_CONFIG_NAME, local_folder, weight_files
from .images import digest_of_images, is_image_folder
from .metric import nearest
from .record import file_stem
from .recordings import digest_of_recordings, is_speech
from .runs import Variant
from .subject import Subject
from .texts import FIELDS, DataSpec, check_data


@dataclass(frozen=True)
class Pretrained:
    """A model in a local Hugging Face folder, on files of texts."""

    folder: str
    tasks: Mapping[str, DataSpec]
    name: str = ""
    at: int | None = None
    length: int = 128
    """Tokens of a text that are kept unless its settings say so, or as many as the model has positions."""
    on: str = ""
    """The name of the data, where the same model is measured on several."""

    @property
    def id(self) -> str:
        return self.name or file_stem(Path(self.folder).resolve().name)

    @property
    def step(self) -> int | None:
        return self.at

    @property
    def group(self) -> str:
        if self.at is None:
            return self.id
        ending = f" on {self.on}" if self.on else ""
        return (STEP.sub("", self.id.removesuffix(ending)) or "run") + ending

    def digest(self, sums: Sums) -> str | None:
        path = local_folder(self.folder)
        if is_adapter(path):
            base = replace(self, folder=str(base_of(path)))
            return digest.of_json(
                [digest.of_files([path / ADAPTER_CONFIG_NAME, weights_of(path)], sums), base.digest(sums)]
            )
        allow_pickle = any(spec.allow_pickle for spec in self.tasks.values())
        texts = (file for ending in _TEXTS for file in path.glob(ending) if file.name not in _OF_TRAINING)
        files = {*weight_files(path, allow_pickle=allow_pickle), *filter(Path.is_file, texts)}
        return digest.of_files(sorted(files), sums)

    def data_digest(self, task: str, sums: Sums) -> str:
        spec = asdict(_task(self.tasks, task))
        for how in ("batch_size", "device"):  # no number depends on them beyond rounding
            del spec[how]
        data, split = spec.pop("data"), spec.pop("split")
        if is_image_folder(data):
            content = digest_of_images(data, spec["num_samples"], sums)
        elif is_speech(data):
            field = spec["second_field"] or spec["field"]
            content = digest_of_recordings(data, spec["num_samples"], field, split, sums)
        elif is_dataset(data):
            content = digest_of(data, split, [spec[name] for name in FIELDS], spec["num_samples"])
        elif (file := Path(data)).is_file():
            content = sums.of(file)
        else:
            raise FileNotFoundError(f"{data!r} is no file: the texts are in a file that ends in {', '.join(ENDINGS)}.")
        return digest.of_json({**spec, "data": content, "length": self.length})

    def open(self) -> Subject:
        specs = list(self.tasks.values())
        for each in specs:
            check_data(each)
        from .inputs.opened import OpenedModel  # and with it transformers, which takes longer to import than torch

        opened, texts = OpenedModel.of(specs[0], Path(self.folder)), dict[str, str]()

        def loss(task: str) -> Loss:
            made, data = opened.loss(_task(self.tasks, task), length=self.length)
            texts[task] = str(data)
            return made

        net, names = opened.net, opened.token_names
        return Subject(net, net.theta, loss, texts=lambda task: texts.get(task, ""), token_names=names)


STEP = re.compile(r"(?:^|[-_/])(?:checkpoint|step|global_step)[-_]?(\d+)/*$")
"""How the names of checkpoints end."""
_TEXTS = ("*.json", "*.model", "*.txt", "*.tiktoken")
"""Files of a folder that say what the model computes, beside its weights."""
_OF_TRAINING = ("trainer_state.json", "generation_config.json", "all_results.json", "train_results.json")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a variant of a family; its tasks are the family's splits."""

    variant: str
    """The variant's folder."""
    at: int
    run: str = ""
    """Its name in results; that of the folder where none is given."""

    @property
    def id(self) -> str:
        return f"{self.group}@{self.at}"

    @property
    def step(self) -> int | None:
        return self.at

    @property
    def group(self) -> str:
        return self.run or Path(self.variant).resolve().name

    def curves(self) -> Mapping[str, np.ndarray] | None:
        """Losses and accuracies over training; None before it ended."""
        return Variant(Path(self.variant)).curves()

    def digest(self, sums: Sums) -> str | None:
        variant = Variant(Path(self.variant))
        file = variant.path / "checkpoints" / f"step_{self.at:05d}.safetensors"
        if not file.is_file():
            raise ValueError(f"{self.variant} has no checkpoint at step {self.at}: it has {variant.checkpoints()}.")
        return digest.of_json([variant.family, variant.config, sums.of(file)])

    def data_digest(self, task: str, sums: Sums) -> str:  # noqa: ARG002
        return _split(task)  # its data follow from the configuration

    def open(self) -> Subject:
        variant = Variant(Path(self.variant))
        kind = family(variant.family)
        config = kind.configured(variant.config)
        kept = kind.checkpoint(config, variant.path, self.at)
        net = kind.network(config)
        check_params(kept.params, net.layout.shapes, f"checkpoint {self.at}")
        if missing := sorted(held_statistics(net).keys() - (kept.buffers or {}).keys()):
            raise ValueError(
                f"checkpoint {self.at} lacks the running statistics `{missing[0]}`, and those of other weights would measure "
                f"another network: let the family {kind.name!r} keep them, `Kept(params, sha256, buffers)`."
            )
        net = replace(net.with_buffers(kept.buffers) if kept.buffers else net, params=kept.params)
        unit = {} if kind.criterion is None else {"unit": kind.criterion.unit}
        return Subject(net, net.theta, lambda task: kind.loss(net, config, _split(task)), own=unit)


@dataclass(frozen=True, eq=False)
class InMemory:
    """A loss that is there already, on one task or several; without a `content` nothing of it is ever reused."""

    losses: Mapping[str, Loss]
    name: str = "model"
    theta: Tensor | None = None
    at: int | None = None
    content: str | None = None
    """What stands for the functions, which have no sum, in the identity of stored results: a version of yours."""
    run: str = ""
    """The training run that it is a checkpoint of; of one with a step, its name without that at its end."""

    @property
    def id(self) -> str:
        return self.name

    @property
    def step(self) -> int | None:
        return self.at

    @property
    def group(self) -> str:
        return self.run or re.sub(rf"\W*{self.at}$", "", self.name) or self.name

    def digest(self, sums: Sums) -> str | None:  # noqa: ARG002
        if self.content is None:
            return None
        net = next(iter(self.losses.values())).net
        fixed = [*net.frozen.values(), *net.buffers.values()]
        weights = net.params.values() if self.theta is None else [self.theta]
        return digest.of_json([self.content, digest.of_tensors([*weights, *fixed])])

    def data_digest(self, task: str, sums: Sums) -> str:  # noqa: ARG002
        loss = _task(self.losses, task)
        return digest.of_json([loss.criterion.name, digest.of_tensors(loss.tensors())])

    def open(self) -> Subject:
        net = next(iter(self.losses.values())).net
        if self.theta is None:
            return Subject(net, net.theta, lambda task: _task(self.losses, task))
        here = replace(net, params=net.layout.unravel(self.theta))
        return Subject(here, self.theta, lambda task: _task(self.losses, task), is_bare=bool(held_statistics(net)))


def batch_size(source: Any, task: str) -> Any:
    """Sequences of a batch, on several data sets of each; None where the digest of the data says how they are cut."""
    if hasattr(source, "names_of"):
        return [batch_size(source.source, each) for each in source.names_of(task)]
    tasks = getattr(source, "tasks", None)
    return None if tasks is None else _task(tasks, task).batch_size


def _task(tasks: Mapping[str, Any], task: str) -> Any:
    if task not in tasks:
        raise ValueError(f"there are no data {task!r}{nearest(task, tasks)}")
    return tasks[task]


def _split(task: str) -> str:
    if task not in SPLITS:
        raise ValueError(f"a family has no data {task!r}{nearest(task, SPLITS)}")
    return task
