"""From a model's folder and a file of texts to a loss: what every study of a user's own model begins with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.architectures import family_of
from ...core.criterion import Criterion, causal_lm, classification, masked_lm, seq2seq_lm
from ...core.keys import fold_in, key
from ...core.model import Functional, functional
from ...core.objective import Loss, objective
from ..texts import DataSpec, Task
from .batches import Data, make_batches
from .pixels import image_batches
from .pretrained import load_model, load_tokenizer, task_of
from .speech import speech_batches
from .text import read_texts
from .tokens import max_positions

_CRITERIA: dict[Task, Criterion] = {
    "causal": causal_lm,
    "masked": masked_lm,
    "classification": classification,
    "seq2seq": seq2seq_lm,
    "image_classification": classification,
    "speech": seq2seq_lm,
}

_ROUTED = "a mixture of experts: derivatives are those within the routing at theta, steps may change it"


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model in memory, on whatever data are asked for."""

    folder: Path
    model: PreTrainedModel
    net: Functional
    tokenizer: PreTrainedTokenizerBase | None = None
    """None: the one in the folder, loaded when it is needed."""

    @classmethod
    def of(cls, spec: DataSpec, folder: Path) -> OpenedModel:
        """The model of a local folder as the data's settings say that it computes."""
        model = load_model(
            folder, task=spec.task, dtype=spec.dtype, allow_pickle=spec.allow_pickle, trainable=spec.trainable
        )
        sees = task_of(model) != "image_classification"  # images have no mask
        if sees and spec.attention != "keep" and family_of(model.config) is None:
            raise ValueError(
                f'how a {model.config.model_type!r} model masks its attention is not known here. With `attention="keep"` '
                "the model masks itself, for losses, slopes and difference curvatures (`funcscope directional`)."
            )
        compute = None if spec.compute_dtype == "auto" else getattr(torch, spec.compute_dtype)
        chosen = None if spec.trainable == "adapter" else "all"
        model = model.to(spec.device)
        net = functional(model, attention=spec.attention, trainable=chosen, dtype=compute, remat=spec.remat)
        return cls(folder, model, net)

    def length(self, spec: DataSpec, length: int = 128) -> int:
        """Tokens after which a text is cut off."""
        return spec.max_seq_length or min(length, max_positions(self.model) or length)

    def loss(self, spec: DataSpec, *, length: int = 128) -> tuple[Loss, Data]:
        """The loss on the texts, cut off at `length` tokens unless the data's settings say where; or on images, or
        recordings."""
        task, most = task_of(self.model), self.length(spec, length)
        if task == "image_classification":
            return self._loss_on_images(spec)
        if task == "speech":
            return self._loss_on_speech(spec, most)
        data = make_batches(
            read_texts(
                spec.data,
                field=spec.field,
                label_field=spec.label_field,
                second_field=spec.second_field,
                unit=spec.unit,
                split=spec.split,
                num_samples=spec.num_samples,
            ),
            self._tokenizer(),
            self.model,
            task=task,
            num_samples=spec.num_samples,
            max_seq_length=most,
            batch_size=spec.batch_size,
            packing=spec.packing,
            key=fold_in(key(spec.seed), "masked tokens"),
        )
        if most < (spec.max_seq_length or length):
            data = replace(data, limit=f"the model has {most} positions: texts end there, and not at {length} tokens")
        if self.net.routed:
            data = replace(data, limit="; ".join(filter(None, (data.limit, _ROUTED))))
        return self._scored(data, task)

    def _loss_on_images(self, spec: DataSpec) -> tuple[Loss, Data]:
        data = image_batches(
            spec.data,
            self.model,
            self.folder,
            num_samples=spec.num_samples,
            batch_size=spec.batch_size,
            dtype=self.net.layout.leaves[0].dtype,
        )
        return self._scored(data, "image_classification")

    def _loss_on_speech(self, spec: DataSpec, length: int) -> tuple[Loss, Data]:
        data = speech_batches(
            spec.data,
            self.model,
            self.folder,
            self._tokenizer(),
            field=spec.second_field or spec.field,
            split=spec.split,
            num_samples=spec.num_samples,
            max_seq_length=length,
            batch_size=spec.batch_size,
            dtype=self.net.layout.leaves[0].dtype,
        )
        return self._scored(data, "speech")

    def _scored(self, data: Data, task: Task) -> tuple[Loss, Data]:
        batches = [{name: value.to(self.net.device) for name, value in batch.items()} for batch in data.batches]
        return objective(self.net, batches, _CRITERIA[task]), data

    def token_names(self, ids: list[int]) -> list[str]:
        """As the vocabulary has them."""
        return [str(name) for name in self._tokenizer().convert_ids_to_tokens(ids)]

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self.tokenizer or load_tokenizer(self.folder, self.model)
