"""From a model's folder and its texts to the file that a merge by Fisher information or by RegMean takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from ..core.checks import check_choice, check_count
from ..core.keys import fold_in, key
from .digest import Sums, of_files
from .fisher_files import write_fisher, write_input_grams
from .stored_model import StoredModel
from .tensor_file import TensorFile
from .texts import DataSpec, check_data

What = Literal["fisher", "inputs"]


def measure_for_merge(
    model: str | Path, spec: DataSpec, out: str | Path, *, what: What = "fisher", num: int = 1, length: int = 128
) -> dict[str, Any]:
    """Write the Fisher diagonal of a model on its texts, or the Grams of its layers' inputs; what the file says of itself.

    num: draws of all labels, of the Fisher diagonal. length: tokens of each text, unless `spec` says. The file names model,
    texts and settings in its metadata, so that it can be shared, and appears when it is complete.

    Raises ValueError or OSError, before the model is opened, for settings and a place that cannot be; FileExistsError where
    `out` exists, which may be a model's weights; and ValueError, by name, for a weight that is not finite.
    """
    check_choice("what", what, ("fisher", "inputs"))
    check_count("num", num)
    check_data(spec)
    target = Path(out)
    if target.suffix != ".safetensors" or target.is_dir():
        raise ValueError(f"`out` must be a file that ends in .safetensors, got {str(out)!r}.")
    if target.exists():
        raise FileExistsError(f"{str(out)!r} exists: choose a new file, nothing is overwritten.")
    stored = StoredModel(model)
    stored.check_finite()
    from .inputs.opened import OpenedModel  # and with it transformers, which takes longer to import than torch

    opened = OpenedModel.of(spec, stored.folder)
    loss, data = opened.loss(spec, length=length)
    made = {
        "what": "diagonal of the Fisher information per scored token"
        if what == "fisher"
        else "sums of x x' over tokens",
        "model": stored.label,
        "weights_sha256": stored.digest(),
        "data": Path(spec.data).name,
        "texts": data.num_samples,
        "max_seq_length": spec.max_seq_length or opened.length(spec, length),
        "batch_size": spec.batch_size,
        "seed": spec.seed,
        "funcscope": __version__,
    } | ({"draws": num} if what == "fisher" else {})
    if Path(spec.data).is_file():
        made["data_sha256"] = of_files([Path(spec.data)], Sums(None))
    metadata = {"format": "pt", "made": json.dumps(made)}
    if what == "fisher":
        write_fisher(loss, target, key=fold_in(key(spec.seed), "fisher"), num=num, metadata=metadata)
    else:
        write_input_grams(opened.model, data.batches, target, metadata=metadata)
    return made


def measured(method: str, model: StoredModel, spec: DataSpec, out: Path) -> TensorFile:
    """What a method needs to know of a model's texts, in a file."""
    file = out.with_suffix(".safetensors")
    measure_for_merge(model.folder, spec, file, what="fisher" if method == "fisher" else "inputs")
    return TensorFile(file)
