"""Which texts a model is looked at on, and how it computes: what is said of them before anything is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..core.checks import check_count
from ..core.model import Attention

Task = Literal["causal", "masked", "classification", "seq2seq", "image_classification", "speech"]
DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Unit = Literal["line", "paragraph", "document"]
FIELDS = ("field", "label_field", "second_field")
"""What is read of a row."""


class Usual(int):
    """A whole number that nobody has chosen: it gives way where a model cannot have it.

    >>> Usual(512) == 512, isinstance(Usual(512) + 0, Usual)
    (True, False)
    """


@dataclass(frozen=True)
class DataSpec:
    """Which texts are scored, and how the model computes: what the settings of every study have."""

    data: str
    field: str = "text"
    label_field: str | None = None
    second_field: str | None = None
    unit: Unit = "paragraph"
    task: Task | None = None
    num_samples: int = 64
    max_seq_length: int | None = None
    """None: as many as the study says (128), or as many positions as the model has."""
    batch_size: int = 8
    packing: bool = False
    seed: int = 42
    split: str = "train"
    """Of a Hugging Face data set."""
    dtype: DType = "auto"
    compute_dtype: DType = "auto"
    attention: Attention = "auto"
    remat: Literal["none", "layer"] = "none"
    trainable: Literal["all", "adapter"] = "all"
    """adapter: theta is what a low-rank adapter has trained; all: it is merged into its model."""
    device: str = "cpu"
    allow_pickle: bool = False


def check_data(spec: DataSpec) -> None:
    """What can be said before a model is loaded; the rest is checked where it is used."""
    for name in ("num_samples", "max_seq_length", "batch_size"):
        if getattr(spec, name) is not None:
            check_count(name, getattr(spec, name))
    try:
        torch.empty(0, device=spec.device)
    except (RuntimeError, AssertionError) as err:
        reason = str(err).splitlines()[0]
        raise ValueError(f"the device {spec.device!r} cannot be used ({reason}): pass another `device`.") from err
