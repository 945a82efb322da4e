"""Folders of images: which are taken, as what pixels, and a study of a classifier on them."""

import importlib.util

import numpy as np
import pytest
import torch
import transformers
from folders import tokenizer
from problems import seeded
from test_architectures import classifier
from torch.nn import functional as F
from torch.testing import assert_close

import funcscope as fs
from funcscope.cli import main
from funcscope.study.digest import Sums
from funcscope.study.images import class_names, digest_of_images, is_image_folder, pictures
from funcscope.study.inputs import image_batches, load_model, make_batches
from funcscope.study.inputs.opened import OpenedModel
from funcscope.study.inputs.text import read_texts
from funcscope.study.texts import DataSpec

NAMES = ("cat", "dog", "owl")
needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="Pillow is not installed")


def empty_files(folder, **counts):
    """Files with the names of images in sub-folders, and some that are none."""
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        (folder / label / "readme.txt").write_text("none")
        for i in range(count):
            (folder / label / f"{i}.PNG").write_bytes(bytes([i]))
    (folder / ".hidden").mkdir()
    return folder


def drawn(folder, size=(10, 6), mode="RGB", num=2):
    """Images of random pixels, of three classes; their arrays by file."""
    from PIL import Image

    arrays = {}
    for k, label in enumerate(NAMES):
        (folder / label).mkdir(parents=True)
        for i in range(num):
            shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
            pixels = seeded(10 * k + i, lambda shape=shape: torch.randint(0, 256, shape)).numpy().astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
            arrays[f"{label}/{i}.png"] = pixels
    return arrays


def saved(path, **changes):
    """A folder with a small classifier."""
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        **{"num_channels": 3, "id2label": dict(enumerate(NAMES)), "label2id": {x: i for i, x in enumerate(NAMES)}, **changes},
    )  # fmt: skip
    seeded(0, lambda: transformers.ViTForImageClassification(config)).save_pretrained(path)
    return path


# Which


def test_classes_take_turns(tmp_path):
    folder = empty_files(tmp_path / "a", b=3, a=1, c=0)
    assert [f"{label}/{file.name}" for file, label in pictures(folder, 9)] == [
        "a/0.PNG",
        "b/0.PNG",
        "b/1.PNG",
        "b/2.PNG",
    ]
    assert [label for _, label in pictures(folder, 2)] == ["a", "b"]
    assert class_names(folder) == ["a", "b"]
    assert is_image_folder(folder)
    assert not is_image_folder(folder / "a")
    assert not is_image_folder(folder / "nowhere")


def test_the_sum_is_that_of_what_is_taken(tmp_path):
    folder, again = empty_files(tmp_path / "a", a=2, b=2), empty_files(tmp_path / "b", a=2, b=2)
    sums = Sums(None)
    before = [digest_of_images(folder, num, sums) for num in (2, 4)]
    assert [digest_of_images(again, num, sums) for num in (2, 4)] == before
    assert len(set(before)) == 2
    (folder / "b" / "1.PNG").write_bytes(b"other")
    after = [digest_of_images(folder, num, Sums(None)) for num in (2, 4)]
    assert after[0] == before[0]
    assert after[1] != before[1]


# As what


@needs_pillow
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("L", 3)])
def test_pixels_without_a_processor(tmp_path, mode, channels):
    arrays = drawn(tmp_path / "images", size=(8, 8), mode=mode)
    model_folder = saved(tmp_path / "model", num_channels=channels)
    data = image_batches(tmp_path / "images", load_model(model_folder), model_folder, batch_size=4)
    assert "6 images of 3 classes in 2 batches; without a preprocessor_config.json" in str(data)
    pixels, labels = (torch.cat([batch[name] for batch in data.batches]) for name in ("pixel_values", "labels"))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    for one, name in zip(
        pixels, ("cat/0.png", "dog/0.png", "owl/0.png", "cat/1.png", "dog/1.png", "owl/1.png"), strict=True
    ):
        by_hand = torch.from_numpy(arrays[name]).float() / 127.5 - 1
        by_hand = by_hand.expand(channels, 8, 8) if mode == "L" else by_hand.movedim(-1, 0)
        assert_close(one, by_hand, rtol=0, atol=1e-6)


@needs_pillow
def test_images_are_resized_and_a_processor_is_heeded(tmp_path):
    drawn(tmp_path / "images")
    folder = saved(tmp_path / "model")
    plain = image_batches(tmp_path / "images", load_model(folder), folder, num_samples=2)
    assert plain.batches[0]["pixel_values"].shape == (2, 3, 8, 8)
    settings = {"size": {"height": 8, "width": 8}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    transformers.ViTImageProcessorPil(**settings).save_pretrained(folder)
    heeded = image_batches(tmp_path / "images", load_model(folder), folder, num_samples=2)
    assert "by the model's preprocessor_config.json" in str(heeded)
    shift = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    expected = (plain.batches[0]["pixel_values"] / 2 + 0.5 - shift) / 0.5
    assert_close(heeded.batches[0]["pixel_values"], expected, rtol=0, atol=0.02)  # its resizing rounds to whole levels


@needs_pillow
def test_a_study_of_a_classifier(tmp_path, capsys):
    drawn(tmp_path / "images")
    folder = saved(tmp_path / "model")
    spec = DataSpec(str(tmp_path / "images"), num_samples=6, batch_size=4, compute_dtype="float64")
    opened = OpenedModel.of(spec, folder)
    loss, data = opened.loss(spec)
    batch = {name: torch.cat([each[name] for each in data.batches]) for name in ("pixel_values", "labels")}
    theirs = F.cross_entropy(load_model(folder).double()(pixel_values=batch["pixel_values"]).logits, batch["labels"])
    assert float(loss(opened.net.theta)) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert loss.criterion is fs.classification
    out = tmp_path / "out"
    command = [
        "directional",
        str(folder),
        "--data",
        spec.data,
        "--out",
        str(out),
        "--num-samples",
        "4",
        "--samples",
        "4",
    ]
    assert main(command) == 0
    assert any(out.iterdir())
    capsys.readouterr()


def test_inner_products_and_factors_of_a_classifier():
    """An image at a time too, where the class token's table has no copies."""
    x, y = seeded(1, lambda: torch.randn(3, 1, 8, 8).double()), torch.tensor([0, 1, 2])
    loss = fs.objective(fs.functional(classifier("vit")), [({"pixel_values": x}, y)], fs.classification)
    theta = loss.net.theta
    each = [
        fs.objective(loss.net, [({"pixel_values": x[i : i + 1]}, y[i : i + 1])], fs.classification) for i in range(3)
    ]
    rows = torch.stack([torch.func.grad(one)(theta) for one in each])
    for size in (1, 3):
        assert_close(fs.curvature.gram(loss, theta, chunk_size=size).total, rows @ rows.T, rtol=1e-6, atol=1e-9)
    factors = fs.curvature.kfac_factors(loss, theta, key=fs.key(0), num=1)
    assert torch.isfinite(factors.matvec(theta)).all()


# Bad input


@needs_pillow
def test_images_and_classes_that_do_not_fit(tmp_path):
    drawn(tmp_path / "images")
    folder = saved(tmp_path / "model")
    model = load_model(folder)
    (tmp_path / "images" / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0.png is damaged or no image"):
        image_batches(tmp_path / "images", model, folder)
    (tmp_path / "images" / "dog").rename(tmp_path / "images" / "wolf")
    with pytest.raises(ValueError, match=r"wolf is no class of the model: .*'cat', 'dog', 'owl'.*number from 0 to 2"):
        image_batches(tmp_path / "images", model, folder)
    numbers = tmp_path / "numbers"
    drawn(numbers)
    for i, name in enumerate(NAMES):
        (numbers / name).rename(numbers / str(2 - i))
    data = image_batches(numbers, model, folder)
    assert data.batches[0]["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert "numbers of their folders" in str(data)
    unnamed = load_model(
        saved(
            tmp_path / "unnamed",
            id2label=dict(enumerate(f"LABEL_{i}" for i in range(3))),
            label2id={f"LABEL_{i}": i for i in range(3)},
        )
    )
    again = tmp_path / "again"
    drawn(again)
    assert "folders are taken in their order" in str(image_batches(again, unnamed, folder))
    with pytest.raises(ValueError, match=r"is a folder of images.*this is a model of text: pass a file of texts"):
        read_texts(again)
    with pytest.raises(ValueError, match=r"has no images in sub-folders.*a model of images takes a folder"):
        image_batches(folder / "config.json", model, folder)
    with pytest.raises(ValueError, match="by `image_batches`"):
        make_batches([], tokenizer(), model, task="image_classification")


@needs_pillow
def test_sizes_that_differ_are_named(tmp_path):
    drawn(tmp_path / "images")
    (tmp_path / "images" / "cat" / "0.png").unlink()
    drawn(tmp_path / "more", size=(20, 6))
    (tmp_path / "more" / "cat" / "0.png").rename(tmp_path / "images" / "cat" / "0.png")
    folder = saved(tmp_path / "model")
    transformers.ViTImageProcessorPil(size={"shortest_edge": 8}).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"ends as pixels of shape .*a size of `height` and `width`"):
        image_batches(tmp_path / "images", load_model(folder), folder)


def test_without_pillow_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    empty_files(tmp_path / "images", **{"0": 1})
    with pytest.raises(ImportError, match=r"needs Pillow: install it with `pip install 'funcscope\[vision\]'`"):
        image_batches(tmp_path / "images", classifier("vit"), tmp_path)
