"""Laws of every result: stored and restored, as a dictionary, a frame, a table, in a notebook."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from results import EXAMPLES, example  # imports funcscope, with all its results

from funcscope.core.estimate import Crossed
from funcscope.core.keys import Key, key
from funcscope.core.pack import Packed, equal, pack, storable, unpack
from funcscope.core.result import Result, quantity
from funcscope.core.store import Damaged, to_json
from funcscope.core.tables import said

every = pytest.mark.parametrize("name", EXAMPLES)


def classes(base: type = Result) -> set[type]:
    return {each for sub in base.__subclasses__() for each in {sub, *classes(sub)}}


def test_every_result_of_the_package_has_an_example_here():
    theirs = [each for each in classes() if each.__module__.startswith("funcscope.")]
    ours = {each.__name__ for each in theirs if hasattr(sys.modules[each.__module__], each.__name__)}  # not of doctests
    assert {name for name in ours if not name.startswith("_")} == EXAMPLES.keys()  # _: bases of several


@every
def test_a_result_that_was_stored_comes_back_equal_to_the_last_bit(name, tmp_path):
    result = example(name)
    for suffix in ("npz", "safetensors"):
        result.save(tmp_path / f"a.{suffix}")
        back = type(result).load(tmp_path / f"a.{suffix}")
        assert type(back) is type(result)
        assert back == result
        assert str(back) == str(result)
        same(back.asdict(), result.asdict())


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        mine, theirs = np.asarray(value), np.asarray(other[name])
        if np.issubdtype(mine.dtype, np.inexact):  # what is computed: sums depend on where in memory their terms lie
            np.testing.assert_allclose(mine, theirs, rtol=1e-6 if mine.dtype.itemsize < 8 else 1e-13, atol=0)
        else:
            np.testing.assert_array_equal(mine, theirs)


@every
def test_every_field_decides_equality(name):
    result = example(name)
    for each in dataclasses.fields(result):
        value = getattr(result, each.name)
        other = value + 1 if isinstance(value, (int, float)) and not isinstance(value, bool) else "another"
        if other == value or (isinstance(value, float) and not math.isfinite(value)):
            other = 0.5
        changed = object.__new__(type(result))
        vars(changed).update(
            {key: x for key, x in vars(result).items() if key in {f.name for f in dataclasses.fields(result)}}
        )
        vars(changed)[each.name] = other
        assert changed != result, each.name


@every
def test_a_dictionary_holds_plain_values_that_json_and_numpy_can_say(name):
    result = example(name)
    values = result.asdict()
    assert values
    json.dumps(to_json(values), allow_nan=False)
    for documented, value in values.items():
        assert isinstance(documented, str)
        assert isinstance(value, (bool, int, float, str, tuple, list, np.ndarray, type(None))), documented
        if isinstance(value, np.ndarray) and value.size:
            value[...] = 0  # it is the reader's own
    same(type(result).asdict(example(name)), example(name).asdict())


@every
def test_a_frame_has_every_number_once_with_its_unit_axes_and_error(name):
    result = example(name)
    frame = result.frame()
    assert {"quantity", "unit", "value"} <= set(frame.columns)
    for entry in result.entries():
        rows = frame[frame["quantity"] == entry.name]
        if hasattr(entry.value, "named"):  # an estimate
            for error in ("value", "stderr", "stderr_data", "stderr_total"):
                if hasattr(entry.value, error):
                    assert float(rows[error].iloc[0]) == pytest.approx(float(getattr(entry.value, error)), nan_ok=True)
        if isinstance(entry.value, torch.Tensor):
            assert rows["value"].to_numpy() == pytest.approx(entry.value.double().flatten().numpy(), nan_ok=True)
            assert len(entry.quantity.per) == entry.value.ndim, entry.name
        for axis in entry.quantity.per:
            assert not len(rows) or rows[axis].notna().all()
    assert not frame.duplicated(["quantity", *(set(frame.columns) & axes(result))]).any()


def axes(result):
    return {axis for entry in result.entries() for axis in entry.quantity.per}


@every
def test_what_is_printed_has_every_number_that_has_no_axis(name):
    result = example(name)
    if type(result).__str__ is not Result.__str__:
        assert f"{float(result.value):.4g}" in str(result)
        return
    for text in (str(result), result._repr_html_()):
        for entry in result.entries():
            assert entry.quantity.per or not entry.quantity.shown or entry.name in text, entry.name
        assert all(note.split()[0] in text for note in result.notes)
    html.parser.HTMLParser().feed(result._repr_html_())


@every
def test_results_are_frozen_and_documented(name):
    result = example(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, dataclasses.fields(result)[0].name, 0)
    assert type(result).__doc__
    assert all(each.label for each in result.quantities().values())


def test_the_guards_of_the_store_hold(tmp_path):
    pairs = example("Eigenpairs")
    path = tmp_path / "a.npz"
    pairs.save(path)
    with pytest.raises(ValueError, match="stored Eigenpairs, no Solution"):
        type(example("Solution")).load(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Damaged):
        Result.load(path)
    arrays, meta = pairs.arrays(), pairs.meta()
    with pytest.raises(ValueError, match="otherwise compute it again"):
        unpack(type(pack(0))(arrays, {**meta, "is": "Nothing"}))
    with pytest.raises(TypeError, match="no stored form"):
        pack(object())


def test_a_frame_without_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'funcscope\[frame\]'"):
        example("Eigenpairs").frame()


def test_nan_equals_nan_and_nothing_else():
    nan, one = torch.tensor([math.nan, 1.0]), torch.tensor([2.0, 1.0])
    assert equal(pack(nan), pack(nan.clone()))
    assert not equal(pack(nan), pack(one))
    assert not equal(pack(one), pack(nan))
    assert not equal(pack(one), pack(one.double()))


def test_a_class_of_the_package_has_no_second_of_its_name():
    with pytest.raises(TypeError, match="name this one otherwise"):
        type("Eigenpairs", (Result,), {"__module__": "funcscope.elsewhere", "__annotations__": {}})


numbers = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
dtypes, shapes = st.sampled_from([np.float64, np.float32, np.int64, np.bool_]), hnp.array_shapes(min_dims=0, max_dims=3)
arrays = hnp.arrays(dtypes, shapes)
leaves = numbers | arrays | arrays.map(torch.as_tensor)
trees = st.recursive(
    leaves,
    lambda x: st.lists(x, max_size=3) | st.tuples(x, x) | st.dictionaries(st.text(max_size=3), x, max_size=3),
)


@given(tree=trees)
def test_whatever_is_packed_is_unpacked(tree):
    packed = pack({"a": tree})
    again = unpack(type(packed)(packed.arrays, json.loads(json.dumps(packed.tree, allow_nan=False))))
    assert equal(pack(again), packed)


class Layered(Result):
    """A result of a user's own."""

    widths: torch.Tensor = quantity("width", per="layer")
    chunk: int = 0
    first_key: Key = key(0)
    key: Key = key(1)


@pytest.mark.parametrize("number", [np.int64(2), np.float32(0.5), np.bool_(True)])
def test_numbers_of_numpy_are_numbers(number, tmp_path):
    result = Layered(torch.ones(2), number)
    assert result == result
    result.save(tmp_path / "a.npz")
    assert Layered.load(tmp_path / "a.npz") == result


def test_arrays_are_the_readers_own():
    result = Layered(torch.ones(2))
    result.arrays()["widths"].zero_()
    assert torch.equal(result.widths, torch.ones(2))


def test_every_key_has_its_seed():
    values = Layered(torch.ones(2)).asdict()
    assert (values["seed"], values["first_key_seed"]) == (1, 0)
    assert values["key"] != values["first_key"]


def test_a_class_that_is_defined_again_in_a_notebook_is_the_same():
    old = Layered(torch.ones(2))

    def again():
        class Layered(Result):
            widths: torch.Tensor = quantity("width", per="layer")
            chunk: int = 0
            first_key: Key = key(0)
            key: Key = key(1)

        return Layered(torch.ones(2))

    assert old == again()
    assert old == old
    storable(Layered)


def test_classes_of_one_name_in_two_modules_are_two_kinds_of_result(tmp_path):
    here, there = (
        type(
            "Layered",
            (Result,),
            {"__module__": module, "__annotations__": {"share": float}, "share": quantity("share")},
        )
        for module in (__name__, "builtins")
    )
    for cls in (here, there):
        file = tmp_path / f"{cls.__module__}.npz"
        cls(0.5).save(file)
        assert Result.load(file) == cls(0.5)
        assert type(Result.load(file)) is cls
    assert here(0.5) != there(0.5)
    storable(Layered)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0), (1, True), (0.0, -0.0), ((1,), [1]), (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([complex(math.nan, 1)]), torch.tensor([complex(1, math.nan)])),
    ],
)  # fmt: skip
def test_what_differs_in_a_bit_is_not_equal(one, other):
    assert not equal(pack({"x": one}), pack({"x": other}))
    for value in (one, other):
        assert equal(pack({"x": value}), pack({"x": value}))


@pytest.mark.parametrize(
    ("suffix", "dtype", "other"),
    [("npz", torch.bfloat16, "safetensors"), ("safetensors", torch.complex128, "npz")],
)
def test_a_dtype_that_a_format_lacks_is_refused_with_the_other_format(suffix, dtype, other, tmp_path):
    result = Layered(torch.ones(2, dtype=dtype))
    with pytest.raises(ValueError, match=rf"has no {dtype}.*save to a \.{other} file"):
        result.save(tmp_path / f"a.{suffix}")
    result.save(tmp_path / f"a.{other}")
    assert Layered.load(tmp_path / f"a.{other}") == result


def test_a_file_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ValueError, match="not written by funcscope: choose another name"):
        Layered(torch.ones(2)).save(tmp_path / "config.npz")
    assert (tmp_path / "config.json").read_text() == '{"hidden_size": 8}'
    assert not (tmp_path / "config.npz").exists()


@pytest.mark.parametrize(
    "tree",
    [
        {"is": "dtype", "value": "load"},
        {"is": "tensor", "at": "nowhere"},
        {"is": "Layered", "fields": {}},
        {"is": "os.system"},
    ],
)
def test_a_forged_tree_is_refused(tree):
    with pytest.raises(ValueError, match=r"no (stored )?result"):
        unpack(Packed({}, tree))


def test_the_frame_of_an_estimate_has_all_its_errors():
    crossed = Crossed(torch.tensor(1.0), torch.tensor(0.1), 3, torch.tensor(0.2), torch.tensor(0.3), 4.0)
    (row,) = crossed.frame().to_dict("records")
    assert (row["value"], row["stderr"], row["stderr_data"], row["stderr_total"]) == pytest.approx((1.0, 0.1, 0.2, 0.3))


@pytest.mark.parametrize(("value", "stderr"), [(59.8, 6e-15), (59.8, 0.0), (-3e9, 1e-3)])
def test_an_error_of_rounding_is_not_printed_digit_by_digit(value, stderr):
    assert len(said(value, stderr)) < 20
