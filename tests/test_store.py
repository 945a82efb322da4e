"""Results on disk: whole or not at all, checked, never pickled."""

import contextlib
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from funcscope.core import store
from funcscope.core.store import Damaged, Outdated, load, save, to_json

SUFFIXES = (".npz", ".safetensors")


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(
    array=hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.bool_]), hnp.array_shapes(min_dims=0, min_side=0)
    ),
    meta=st.dictionaries(
        st.text(max_size=3), st.integers() | st.booleans() | st.none() | st.text(max_size=3), max_size=3
    ),
)
def test_what_is_saved_is_loaded(tmp_path_factory, suffix, array, meta):
    path = tmp_path_factory.mktemp("store") / f"x{suffix}"
    save(path, {"a": array, "b": np.arange(3)}, meta)
    arrays, found, _ = load(path)
    assert found == meta
    back = np.asarray(arrays["a"])
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert np.array_equal(back, array, equal_nan=array.dtype.kind == "f")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_another_version_is_refused(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"x{suffix}"
    monkeypatch.setattr(store, "VERSION", store.VERSION - 1)
    save(path, {"a": torch.arange(3.0)}, {})
    assert load(path).meta == {}
    monkeypatch.undo()
    with pytest.raises(Outdated, match=r"another version of funcscope.*choose a new folder"):
        load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_change_is_noticed(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    save(path, {"a": torch.arange(50.0)}, {"step": 1})
    good = path.read_bytes()
    for harm in (
        good[:40],
        good[:-1],
        b"",
        b"x" + good,
        good.replace(b'"step', b'"stop'),
        good[:-9] + b"?" + good[-8:],
    ):
        if harm != good:
            path.write_bytes(harm)
            with pytest.raises(Damaged, match=r"x\.\w+ is damaged.*delete it to have it made again"):
                load(path)
    path.write_bytes(good)
    assert load(path).meta == {"step": 1}


def test_foreign_files_are_refused_and_never_unpickled(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    np.savez(tmp_path / "foreign.npz", a=np.ones(2))
    np.savez(tmp_path / "pickle.npz", **{store.META: np.array([{"code": 1}], dtype=object)})
    for name in ("foreign.safetensors", "foreign.npz", "pickle.npz"):
        with pytest.raises(Damaged, match="was not written by funcscope"):
            load(tmp_path / name)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    save(path, {"a": np.ones(2)}, {"step": 1})
    before = sorted(os.listdir(tmp_path))

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="No space left"):
        save(path, {"a": np.zeros(2)}, {"step": 2})
    assert sorted(os.listdir(tmp_path)) == before
    assert load(path).meta == {"step": 1}


def test_the_json_beside_it_is_valid_and_says_the_same(tmp_path):
    save(tmp_path / "x.npz", {"a": np.array([np.nan, np.inf])}, {"mean": float("nan"), "shape": (1, 2)})
    beside = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert beside["meta"] == load(tmp_path / "x.npz").meta == {"mean": None, "shape": [1, 2]}
    assert beside["arrays"]["a"] == {"dtype": "float64", "shape": [2]}
    assert np.array_equal(load(tmp_path / "x.npz").arrays["a"], [np.nan, np.inf], equal_nan=True)


def test_one_memory_under_two_names_and_reserved_names(tmp_path):
    x = torch.arange(6.0)
    save(tmp_path / "x.safetensors", {"a": x, "b": x[2:]}, {})
    assert torch.equal(load(tmp_path / "x.safetensors").arrays["b"], x[2:])
    for name in ("file", store.META):
        with pytest.raises(ValueError, match="cannot be named"):
            save(tmp_path / "y.npz", {name: x}, {})


@given(place=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_flipped_byte_is_damage_and_nothing_else(tmp_path_factory, place, byte):
    path = tmp_path_factory.mktemp("store") / "x.npz"
    save(path, {"a": np.arange(30.0)}, {"step": 1})
    good = path.read_bytes()
    place %= len(good)
    path.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
    with contextlib.suppress(Damaged):
        assert load(path).meta == {"step": 1}  # a byte that says nothing: the same one, or zip's own book-keeping


def test_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.safetensors or \.npz"):
        save(tmp_path / "x.pkl", {}, {})
    with pytest.raises(TypeError, match="set has no JSON form"):
        to_json({"a": {1}})
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.npz")
