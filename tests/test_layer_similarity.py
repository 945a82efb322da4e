"""Similarities of layers: those of every pair, whatever space they are computed in, with one null for the largest."""

import math

import pytest
import torch
from test_similarity import MEASURES, every, normal, related
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.standard_errors import jackknife_stderr
from funcscope.representation import layer_similarity


@every
def test_layers_are_the_pairs_of_them_and_the_null_is_shared(name):
    groups = torch.arange(15).repeat_interleave(2)
    a = {"0": normal(0, 30, 6), "1": normal(0, 30, 6)[:, :4].exp()}
    b = {"x": normal(1, 30, 40), "y": normal(0, 30, 6)[:, 1:3] ** 3, "z": normal(0, 30, 6).sin()}
    found = layer_similarity(a, b, groups, key=fs.key(3), measure=name, num=39)
    assert (found.layers, found.other_layers) == (("0", "1"), ("x", "y", "z"))
    largest = []
    for i, x in enumerate(a.values()):
        for j, y in enumerate(b.values()):
            one = MEASURES[name](x, y, groups, key=fs.key(3), num=39)
            for mine, theirs in (
                (found.similarity, one.similarity.value), (found.similarity_stderr, one.similarity.stderr),
                (found.null_mean, one.null_mean), (found.null_quantile, one.null_quantile),
                (found.p_value, one.p_value), (found.calibrated, one.calibrated.value),
                (found.calibrated_stderr, one.calibrated.stderr),
            ):  # fmt: skip
                assert float(mine[i, j]) == pytest.approx(float(theirs), rel=1e-8, abs=1e-12, nan_ok=True)
            largest.append(one.null)
    assert_close(found.largest_null, torch.stack(largest).amax(0), rtol=1e-8, atol=1e-12)
    assert found.largest == found.similarity.max()


def test_layers_of_one_model_are_compared_with_each_other():
    layers = {str(i): normal(i, 50, 8) for i in range(4)}
    found = layer_similarity(layers, key=fs.key(0), num=99)
    assert_close(found.similarity, found.similarity.T, rtol=1e-12, atol=1e-12)
    assert_close(found.similarity.diagonal(), torch.ones(4, dtype=torch.float64))
    assert found.largest == found.similarity.triu(1).max()
    assert found.largest_p_value > 0.05
    assert float(found.largest_calibrated) == 0.0
    related = layer_similarity({**layers, "4": layers["2"].tanh()}, key=fs.key(0), num=99)
    assert related.largest_p_value == 0.01
    assert math.isnan(float(layer_similarity({"0": layers["0"]}, key=fs.key(0), num=19).largest))


def test_kernels_and_the_space_of_units_give_the_same():
    x, y = related(2, 40, 3, 2)  # 40 samples of at most 9 products
    wide = torch.cat([x, torch.zeros(40, 4, dtype=torch.float64)], 1)  # 49 products: kernels
    for name in ("debiased_cka", "cka", "cca"):
        one, other = (MEASURES[name](each, y, key=fs.key(0), num=25) for each in (x, wide))
        pair = [layer_similarity({"a": each}, {"b": wide}, key=fs.key(0), num=25, measure=name) for each in (x, wide)]
        assert float(one.similarity.stderr) == pytest.approx(float(other.similarity.stderr), rel=1e-9)
        assert_close(one.null, other.null, rtol=1e-9, atol=1e-12)
        assert_close(pair[0].largest_null, pair[1].largest_null, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_an_error_is_that_of_kernels_made_afresh_without_each_block_even_of_one_that_is_nearly_all_of_them():
    x, y = related(4, 40, 9, 8)
    groups = torch.arange(20).repeat_interleave(2)
    for scale in (1.0, 1e7):  # of a sequence: without it, nothing is left of the whole's digits
        factor = torch.where(groups == 3, scale, 1.0)[:, None]
        layers = {"x": x * factor, "y": y * factor}
        for name in ("debiased_cka", "cka"):
            found = layer_similarity(layers, groups=groups, key=fs.key(0), num=19, measure=name)
            without = [
                layer_similarity(
                    {each: rows[groups != i] for each, rows in layers.items()}, groups=groups[groups != i], key=fs.key(0),
                    num=19, measure=name,
                ).similarity
                for i in range(20)
            ]  # fmt: skip
            expected = jackknife_stderr(torch.stack(without, -1))
            assert_close(found.similarity_stderr, expected, rtol=1e-7, atol=1e-12)


@every
@pytest.mark.parametrize("value", [0.1, 2.7, 1 / 3])
@pytest.mark.parametrize("width", [2, 50])
def test_a_layer_that_does_not_vary_is_like_no_other_and_not_like_itself(name, value, width):
    """The mean of equal numbers is off by its rounding, and what is left of them is no representation."""
    layers = {"x": normal(0, 33, 5), "still": torch.full((33, width), value, dtype=torch.float64)}
    found = layer_similarity(layers, key=fs.key(0), num=19, measure=name)
    assert found.similarity.isnan().tolist() == [[False, True], [True, True]]
