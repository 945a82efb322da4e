"""Digests of content tell apart what differs in a bit, in the order of entries, in dtype, shape, names or numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from funcscope.core.content import _BLOCK, of_bits, of_tree


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_every_place_and_every_order_counts(dtype):
    num = 40
    units = [sign * row for row in torch.eye(num, dtype=dtype) for sign in (1, -1)]
    pairs = [units[2 * i] + units[2 * j + k] for i, j in itertools.combinations(range(num), 2) for k in (0, 1)]
    ramp = torch.arange(num).to(dtype)
    others = [
        ramp,
        ramp.flip(0),
        ramp.view(5, 8),
        ramp[:-1],
        0 * ramp,
        -0.0 * (ramp + 1),
        ramp[:0],
        ramp[:0].view(0, 3),
    ]
    vectors = units + pairs + others
    assert len({of_bits(x) for x in vectors}) == len(vectors)
    assert all(of_bits(x) == of_bits(x.clone()) for x in vectors)


def test_signs_alone_count():
    """Bits of signs are the highest ones, of which a sum modulo a power of two keeps the parity alone."""
    signs = [torch.tensor(each, dtype=torch.float64) for each in itertools.product((1, -1), repeat=9)]
    assert len({of_bits(x) for x in signs}) == len(signs)


def test_equal_blocks_have_an_order():
    x = torch.cat([torch.ones(_BLOCK), torch.zeros(_BLOCK), torch.ones(3)])
    assert len({of_bits(x), of_bits(x.roll(_BLOCK)), of_bits(x.roll(1))}) == 3


def test_rows_of_a_larger_tensor_are_those_of_their_own():
    table = torch.arange(12.0).view(3, 4)
    assert of_bits(table.T[1]) == of_bits(table.T[1].clone())


def test_what_is_no_tensor_counts_in_a_tree():
    x = torch.ones(2)
    trees = [
        {"x": x},
        {"y": x},
        {"x": x, "gain": 1},
        {"x": x, "gain": 1.0},
        {"x": x, "gain": "1"},
        {"x": x, "gain": None},
        {"x": x, "gain": True},
        {"x": x, "gain": [1, 2]},
        {"x": x, "gain": [[1], 2]},
        {"x": x, "gain": [12]},
        (x, 1),
        [x, x],
        ((x,), x),
        {"x": x.double()},
    ]
    assert len({of_tree(each) for each in trees}) == len(trees)
    assert of_tree({"a": 1, "b": x, "c": object()}) == of_tree({"c": object(), "b": x.clone(), "a": 1})
