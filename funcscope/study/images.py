"""Folders of images, one sub-folder for each class: what is in them, before any is opened."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

from .digest import Sums, of_json

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Picture(NamedTuple):
    """An image's file, and the name of its class."""

    file: Path
    label: str


def is_image_folder(data: str | Path) -> bool:
    """Whether it is a folder with a sub-folder that has an image in it.

    >>> is_image_folder(".")
    False
    """
    path = Path(data)
    return path.is_dir() and any(True for _ in pictures(path, 1))


def pictures(folder: str | Path, num: int) -> Iterator[Picture]:
    """The first `num` images: the first of every class, then the second of every class, both in the order of their names.

    Files whose names do not end as images' do, and those outside sub-folders or deeper, are left out.
    """
    classes = [_of_class(each) for each in sorted(Path(folder).iterdir()) if each.is_dir() and each.name[0] != "."]
    in_turn = chain.from_iterable(zip_longest(*classes))
    return islice((picture for picture in in_turn if picture is not None), num)


def class_names(folder: str | Path) -> list[str]:
    """Of the sub-folders with an image, in their order."""
    return sorted(each.name for each in Path(folder).iterdir() if each.is_dir() and any(True for _ in _of_class(each)))


def digest_of_images(folder: str | Path, num: int, sums: Sums) -> str:
    """The sum of these images and of the names of all classes."""
    return of_json([class_names(folder), [[label, sums.of(file)] for file, label in pictures(folder, num)]])


def _of_class(folder: Path) -> Iterator[Picture]:
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in ENDINGS and file.is_file() and file.name[0] != ".":
            yield Picture(file, folder.name)
