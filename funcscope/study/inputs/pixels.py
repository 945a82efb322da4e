"""Batches of pixels from a folder of images, as one model takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel

from ...core.checks import check_count
from ...core.tables import counted
from ..images import ENDINGS, Picture, class_names, pictures
from ..quiet import first_line, one_line, quiet
from .batches import Data

PROCESSOR = "preprocessor_config.json"
SIDE = 224
"""Pixels on a side where the model does not say."""
Prepare = Callable[[Any], Float[Tensor, "c h w"]]
"""An image of PIL -> what the model takes."""


@dataclass(frozen=True, eq=False)
class ImageData(Data):
    """Batches of `pixel_values` (batch, channels, height, width) and `labels`; made by `image_batches`."""

    num_classes: int = 0

    def __str__(self) -> str:
        each = f"{counted(self.num_samples, 'image')} of {counted(self.num_classes, 'class', 'classes')}"
        return f"{each} in {counted(len(self.batches), 'batch', 'batches')}; {self.limit}"


def image_batches(
    folder: str | Path,
    model: PreTrainedModel,
    model_folder: str | Path,
    *,
    num_samples: int = 64,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> ImageData:
    """Images of a folder with one sub-folder for each class, in turn of the classes (`images.pictures`).

    Pixels are what the image processor in the model's folder makes of them (its PIL backend, so that they do not depend on
    what else is installed); where there is none, the image resized to the model's `image_size`, bilinear, with channels
    scaled from 0 ... 255 to -1 ... 1 (mean and deviation 0.5). Images are turned as their camera says, and made RGB, or grey
    for a model of one channel. The class of a sub-folder is its name in the model's `label2id`, or the number that it is;
    where the model names no classes, the folders are taken in their order, if there are as many.

    Raises ImportError without Pillow; ValueError for a folder without images, a file that is none, a class that the model
    does not have, and images that end in different sizes.
    """
    check_count("num_samples", num_samples)
    check_count("batch_size", batch_size)
    chosen = list(pictures(folder, num_samples)) if Path(folder).is_dir() else []
    if not chosen:
        raise ValueError(
            f"{folder} has no images in sub-folders, one for each class: a model of images takes a folder of files "
            f"there that end in {', '.join(ENDINGS)}."
        )
    index_of, order = _classes(folder, model)
    prepare, how = _preparation(model, Path(model_folder))
    labels = torch.tensor([_index(picture, index_of, model) for picture in chosen])
    pixels = [prepare(_opened(picture.file, _channels(model))).to(dtype) for picture in chosen]
    _check_sizes(chosen, pixels)
    starts = range(0, len(chosen), batch_size)
    batches = [
        {"pixel_values": torch.stack(pixels[i : i + batch_size]), "labels": labels[i : i + batch_size]} for i in starts
    ]
    seen = len({picture.label for picture in chosen})
    return ImageData(
        batches, len(chosen), 0, len(chosen), 0, 0, limit="; ".join(filter(None, (how, order))), num_classes=seen
    )


def _classes(folder: str | Path, model: PreTrainedModel) -> tuple[Mapping[str, int], str]:
    """The class of each sub-folder that the model has, and what is to be said of how they were told apart."""
    names, config = class_names(folder), model.config
    if all(name in config.label2id for name in names):
        return {name: int(config.label2id[name]) for name in names}, ""
    if all(name.isdecimal() for name in names):
        return {name: int(name) for name in names}, "classes are the numbers of their folders"
    if all(str(name).startswith("LABEL_") for name in config.label2id) and len(names) == config.num_labels:
        return {name: i for i, name in enumerate(names)}, "the model names no classes: folders are taken in their order"
    return {name: int(config.label2id[name]) for name in names if name in config.label2id}, ""


def _index(picture: Picture, index_of: Mapping[str, int], model: PreTrainedModel) -> int:
    config = model.config
    index = index_of.get(picture.label)
    if index is None or not 0 <= index < config.num_labels:
        known = ", ".join(map(repr, list(config.label2id)[:5]))
        raise ValueError(
            f"{picture.file.parent} is no class of the model: its name must be one in `label2id` ({known}) or a number "
            f"from 0 to {config.num_labels - 1}."
        )
    return index


def _channels(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "num_channels", 3) or 3)


def _preparation(model: PreTrainedModel, folder: Path) -> tuple[Prepare, str]:
    """How an image becomes pixels, and the same in words."""
    if (folder / PROCESSOR).is_file():
        with quiet(), one_line(f"the image processor in {folder} cannot be loaded"):
            processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
        return lambda image: processor(image, return_tensors="pt")["pixel_values"][
            0
        ], f"pixels by the model's {PROCESSOR}"
    size = getattr(model.config, "image_size", None) or SIDE
    height, width = size if isinstance(size, Sequence) else (size, size)

    def plain(image: Any) -> Tensor:
        small = np.asarray(image.resize((width, height), resample=2))  # bilinear
        values = torch.from_numpy(small.astype(np.float32)) / 255
        return (values[None] if values.ndim == 2 else values.permute(2, 0, 1)) * 2 - 1

    return plain, f"without a {PROCESSOR}, images are resized to {height} x {width} pixels and scaled to -1 ... 1"


def _opened(file: Path, channels: int) -> Any:
    try:
        from PIL import Image, ImageOps  # type: ignore[import-not-found, unused-ignore]
    except ImportError as err:
        raise ImportError(f"{file} needs Pillow: install it with `pip install 'funcscope[vision]'`.") from err
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
        raise ValueError(f"{file} is damaged or no image ({first_line(err)}): save it again, or take it out.") from err


def _check_sizes(chosen: Sequence[Picture], pixels: Sequence[Tensor]) -> None:
    for picture, each in zip(chosen, pixels, strict=True):
        if each.shape != pixels[0].shape:
            raise ValueError(
                f"{picture.file} ends as pixels of shape {tuple(each.shape)}, {chosen[0].file} of {tuple(pixels[0].shape)}: "
                f"give the {PROCESSOR} of the model a size of `height` and `width`, or crop the images alike."
            )
