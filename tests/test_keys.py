"""Keys and draws: pure functions of 128 bits and a block number."""

import concurrent.futures

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded
from scipy import stats

import funcscope as fs
from funcscope.core import keys
from funcscope.core.keys import BLOCK, draw, fill, uniform

SEEDS = st.integers(-(2**70), 2**70)


@given(seed=SEEDS, name=st.text(max_size=5), num=st.integers(1, 40))
def test_the_same_key_draws_the_same_numbers_and_another_key_others(seed, name, num):
    key, like = fs.key(seed), torch.zeros(num, dtype=torch.float64)
    child = fs.fold_in(key, name)
    assert child == fs.fold_in(fs.key(seed), name)
    assert hash(child) == hash(fs.fold_in(key, name))
    assert child.seed == seed
    assert torch.equal(fs.normal(child, like), fs.normal(child, like))
    assert not torch.equal(fs.normal(child, like), fs.normal(fs.fold_in(key, name + "x"), like))
    assert fs.fold_in(key, str(num)) != fs.fold_in(key, num)


def test_two_keys_never_share_a_block():
    """32-bit seeds collide: 1 and 1 + 2^32, or one pair in 77,000. Keys do not."""
    roots = [fs.key(seed) for seed in (0, 1, 2**32, 1 + 2**32, -1, 2**64 + 1)]
    family = roots + [fs.fold_in(root, i) for root in roots for i in range(100)]
    family += [fs.fold_in(root, name) for root in roots for name in ("h.0.weight", "h.0.bias", "0", "1")]
    blocks = {draw(key, 4, "normal").numpy().tobytes() for key in family}
    long = draw(fs.key(7), 5 * BLOCK, "normal").view(5, BLOCK)
    blocks |= {row[:4].numpy().tobytes() for row in long}
    assert len(blocks) == len(family) + 5
    manual = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 + 2**32)]
    assert torch.equal(*manual)  # what torch's own seeding does


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_a_draw_is_the_same_whole_in_blocks_and_on_any_number_of_threads(distribution):
    num = 3 * BLOCK + 77
    whole = draw(fs.key(1), num, distribution)
    longer = draw(fs.key(1), num + BLOCK, distribution)
    assert torch.equal(whole[: 3 * BLOCK], longer[: 3 * BLOCK])
    out = torch.empty(num)
    fill(fs.key(1), out, distribution)
    assert torch.equal(whole, out)
    last = torch.empty(77)
    keys._fill_block(fs.key(1), 3, last, distribution)
    assert torch.equal(whole[3 * BLOCK :], last)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(whole, draw(fs.key(1), num, distribution))
    finally:
        torch.set_num_threads(before)


def test_draws_at_the_same_time_do_not_disturb_each_other():
    wanted = [fs.normal(fs.key(i), torch.zeros(1000)) for i in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: fs.normal(fs.key(i), torch.zeros(1000)), range(40)))
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_the_generators_state_is_laid_out_as_assumed():
    """Oracle: numpy's Mersenne Twister with the same 624 words gives the same 32-bit integers."""
    words = np.random.Philox(key=[1, 2]).random_raw(312)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words.view(np.uint32), "pos": 624}}
    ours = torch.empty(2000, dtype=torch.int32).random_(generator=keys._tools().seeded(words))
    assert (twister.random_raw(2000) % 2**31 == ours.numpy()).all()


@given(seed=SEEDS, block=st.integers(0, 2**40))
def test_a_block_is_philox_at_its_key_and_counter(seed, block):
    """Oracle: a generator of numpy's own making."""
    key = fs.key(seed)
    words = np.array([key.bits % 2**64, key.bits >> 64], dtype=np.uint64)
    wanted = np.random.Philox(key=words, counter=[0, block, 0, 0]).random_raw(7)
    keys._tools().philox_at(fs.key(seed + 1), 3).random_raw(3)  # leaves something in the buffer
    assert (keys._tools().philox_at(key, block).random_raw(7) == wanted).all()


@pytest.mark.slow
@pytest.mark.parametrize("num", [3 * BLOCK, 5])
def test_draws_have_their_distributions(num):
    rows = torch.empty(2 if num > 5 else 20_000, num)
    for i, row in enumerate(rows):
        fill(fs.fold_in(fs.key(3), i), row, "normal")
    assert stats.kstest(rows.flatten().numpy(), "norm").pvalue > 1e-3
    if num > 5:
        assert abs(np.corrcoef(rows[0], rows[1])[0, 1]) < 5 / num**0.5
        blocks = rows[0].view(3, BLOCK)
        assert abs(np.corrcoef(blocks[0], blocks[1])[0, 1]) < 5 / BLOCK**0.5
    signs = torch.cat([draw(fs.fold_in(fs.key(4), i), num, "rademacher") for i in range(20)])
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 5 / len(signs) ** 0.5
    flat = uniform(fs.key(5), torch.zeros(num))
    assert 0 <= flat.min() <= flat.max() < 1
    if num > 5:
        assert stats.kstest(flat.numpy(), "uniform").pvalue > 1e-3


def test_dtype_and_shape_follow_and_the_numbers_are_those_of_float32():
    like = torch.zeros(3, 5, dtype=torch.float64)
    assert torch.equal(fs.normal(fs.key(0), like).float(), fs.normal(fs.key(0), like.float()))
    assert fs.rademacher(fs.key(0), like.bfloat16()).dtype == torch.bfloat16
    assert uniform(fs.key(0), like).shape == (3, 5)


def test_a_draw_inside_a_transform_is_a_constant():
    def scaled(a):
        return a * fs.normal(fs.key(0), torch.zeros(3))

    outside = fs.normal(fs.key(0), torch.zeros(3))
    mapped = torch.func.vmap(scaled)(torch.tensor([1.0, 2.0]))
    assert torch.equal(mapped, torch.stack([outside, 2 * outside]))
    assert torch.equal(torch.func.jvp(scaled, (torch.tensor(1.0),), (torch.tensor(1.0),))[1], outside)
    with torch.inference_mode():
        assert torch.equal(fs.normal(fs.key(0), torch.zeros(3)), outside)


def test_the_global_generator_has_no_influence():
    first = seeded(0, lambda: fs.normal(fs.key(0), torch.zeros(3)))
    assert torch.equal(first, seeded(1, lambda: fs.normal(fs.key(0), torch.zeros(3))))


@pytest.mark.parametrize("seed", [True, 1.5, "1", None])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(TypeError, match=r"`seed`|seed"):
        fs.key(seed)
