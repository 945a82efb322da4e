"""Keys of the stream "device": Philox in operations of torch, against numpy's, and draws made of it."""

import inspect
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import loss_of, seeded
from scipy import stats
from torch.testing import assert_close

import funcscope as fs
from funcscope.core import directions as core_directions
from funcscope.core import keys, philox
from funcscope.core.keys import BLOCK, CPU, draw, fill, uniform
from funcscope.core.pack import Packed, pack, unpack
from funcscope.study.cache import Cache
from funcscope.study.catalogue import metric
from funcscope.study.config import UnifiedConfig
from funcscope.study.engine import run
from funcscope.study.meter import Options
from funcscope.study.sources import InMemory

KEY = fs.key(5, stream="device")
SIZES = [1, 63, 64, 65, BLOCK // 2, BLOCK // 2 + 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77]


def there(key, num, distribution, first=0):
    """What a device does, done here."""
    out = torch.empty(num)
    philox.fill(key.bits, first, out, distribution, BLOCK)
    return out


@given(
    bits=st.integers(0, 2**128 - 1), block=st.integers(0, 2**62), num=st.integers(1, 40), skipped=st.integers(0, 2**40)
)
def test_words_are_those_of_numpy(bits, block, num, skipped):
    """Oracle: a generator of numpy's own making, advanced by numpy."""
    key = np.array([bits % 2**64, bits >> 64], dtype=np.uint64)
    found = philox.words(bits, [block, block + 1], num, CPU, after=4 * skipped).numpy().view(np.uint64)
    for i in range(2):
        wanted = np.random.Philox(key=key, counter=[skipped, block + i, 0, 0]).random_raw(num)
        assert (found[i] == wanted).all()


@pytest.mark.parametrize("num", SIZES)
def test_signs_and_uniform_numbers_have_the_bits_of_the_cpu(num, monkeypatch):
    monkeypatch.setattr(philox, "AT_ONCE", 2 * BLOCK)  # borders of passes, too
    wanted = draw(fs.key(5), num, "rademacher")
    assert torch.equal(there(KEY, num, "rademacher"), wanted)
    last = (num - 1) // BLOCK
    assert torch.equal(there(KEY, num - last * BLOCK, "rademacher", first=last), wanted[last * BLOCK :])
    assert torch.equal(draw(KEY, num, "rademacher"), wanted)
    assert torch.equal(philox.uniform(KEY.bits, num, CPU), uniform(fs.key(5), torch.zeros(num)))
    assert torch.equal(uniform(KEY, torch.zeros(num)), uniform(fs.key(5), torch.zeros(num)))


@pytest.mark.parametrize("num", SIZES)
def test_normal_numbers_are_one_stream_wherever_they_are_made(num, monkeypatch):
    monkeypatch.setattr(philox, "AT_ONCE", 2 * BLOCK)
    here = draw(KEY, num, "normal")
    assert_close(there(KEY, num, "normal"), here, rtol=1e-5, atol=2e-6)
    longer = draw(KEY, num + BLOCK, "normal")
    assert_close(longer[:num], here, rtol=1e-5, atol=2e-6)
    out = torch.empty(num)
    fill(KEY, out, "normal")
    assert torch.equal(out, here)
    start, stop = num // 3, num - num // 5
    assert torch.equal(draw(KEY, num, "normal", start, stop), here[start:stop])
    assert not torch.equal(here, draw(fs.key(5), num, "normal"))


def test_normal_numbers_are_box_and_mullers():
    """Oracle: the formula in float64, with numpy's words."""
    key = np.array([KEY.bits % 2**64, KEY.bits >> 64], dtype=np.uint64)
    halves = np.random.Philox(key=key, counter=[0, 0, 0, 0]).random_raw(BLOCK // 2).view(np.int32).astype(np.int64)
    radius = np.sqrt(-2 * np.log(((halves[::2] & (2**31 - 1)) + 0.5) / 2**31))
    angle = np.pi * halves[1::2] / 2**31
    wanted = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    assert np.abs(draw(KEY, BLOCK, "normal").numpy() - wanted).max() < 5e-6


def test_the_largest_normal_number_is_the_one_that_is_documented():
    out = torch.empty(1, 2)
    philox.normals(torch.zeros(1, 1, dtype=torch.int64), out)
    assert out.tolist() == [[pytest.approx((64 * np.log(2)) ** 0.5, rel=1e-6), 0.0]]
    assert 2 * stats.norm.sf(float(out[0, 0])) == pytest.approx(2.7e-11, rel=0.05)
    philox.normals(torch.full((1, 1), 2**31 - 1), out)  # the smallest radius: 0, as u rounds to 1
    assert bool((out.abs() < 4e-4).all())


@pytest.mark.slow
@pytest.mark.parametrize("num", [3 * BLOCK, 5])
def test_draws_have_their_distributions(num):
    rows = torch.empty(2 if num > 5 else 20_000, num)
    for i, row in enumerate(rows):
        fill(fs.fold_in(KEY, i), row, "normal")
    assert stats.kstest(rows.flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(rows.abs().square().flatten().numpy(), "chi2", args=(1,)).pvalue > 1e-3
    if num == 5:
        return
    others = [*rows[0].view(6, -1), *rows[1].view(6, -1)]  # cosines and sines of every block, of two children
    others += [x.square() - 1 for x in others[:6]]
    correlations = np.corrcoef(np.stack([x.numpy() for x in others]))
    assert np.abs(correlations - np.eye(len(others))).max() < 5 / (BLOCK // 2) ** 0.5
    signs = draw(KEY, num, "rademacher")
    assert abs(float(signs.mean())) < 5 / num**0.5
    assert abs(float((signs[1:] * signs[:-1]).mean())) < 5 / num**0.5
    assert abs(float((signs[BLOCK:] * signs[:-BLOCK]).mean())) < 5 / num**0.5


def test_the_stream_is_the_keys_and_its_childrens():
    assert KEY.bits == fs.key(5).bits
    assert fs.key(5) != KEY
    assert len({KEY, fs.key(5), fs.key(5, stream="device")}) == 2
    child = fs.fold_in(fs.fold_in(KEY, "a"), 3)
    assert child.stream == "device"
    assert child.bits == fs.fold_in(fs.fold_in(fs.key(5), "a"), 3).bits
    assert "stream='device'" in repr(child)
    assert "stream" not in repr(fs.key(5))
    with pytest.raises(ValueError, match="`stream` must be one of 'cpu', 'device', got 'gpu'"):
        inspect.unwrap(fs.key)(5, stream="gpu")


def test_a_stored_key_keeps_its_stream_and_an_ordinary_one_its_form():
    for key in (KEY, fs.key(5)):
        tree = json.loads(json.dumps(pack(key).tree))
        assert unpack(Packed({}, tree)) == key
    assert pack(fs.key(5)).tree == {"is": "Key", "fields": {"bits": fs.key(5).bits, "seed": 5}}
    with pytest.raises(ValueError, match="compute it again"):
        unpack(Packed({}, {"is": "Key", "fields": {"seed": 5, "stream": "device"}}))


def test_a_result_says_which_stream_it_has_and_can_be_made_again(tmp_path):
    loss = loss_of("mlp")
    net = loss.net
    options = {"n_samples": 6, "span": 0.1}
    found = {key: fs.directional_losses(loss, net.theta, key=key, **options) for key in (KEY, fs.key(5))}
    assert found[KEY].asdict()["draws"] == "device"
    assert "draws" not in found[fs.key(5)].asdict()
    assert not torch.equal(found[KEY].losses, found[fs.key(5)].losses)
    found[KEY].save(tmp_path / "a.npz")
    stored = type(found[KEY]).load(tmp_path / "a.npz")
    assert stored == found[KEY]
    assert fs.directional_losses(loss, net.theta, key=stored.key, **options) == stored
    axes = [fs.plane_directions(net, key=key).settings.get("draws") for key in (KEY, fs.key(5))]
    assert axes == ["device", None]


def test_directions_have_the_same_numbers_however_many_parts_are_drawn_together(monkeypatch):
    net = fs.functional(seeded(0, lambda: torch.nn.Sequential(torch.nn.Linear(700, 4000), torch.nn.Linear(3, 1))))
    for normalize in ("filter", "layer"):
        one, two = (fs.directions(net, key=KEY, num=1, normalize=normalize)[0] for _ in range(2))
        wanted = {name: one.leaf(name) for name in net.layout.names}
        with monkeypatch.context() as patch:
            patch.setattr(core_directions, "drawn_on", lambda *_: torch.device("meta"))
            assert all(torch.equal(two.leaf(name), value) for name, value in wanted.items())
            num = len(list(two.parts("0.weight")))
        assert num == len(core_directions.row_slices(net.layout.by_name["0.weight"])) > 4
        assert torch.equal(one.dense(), net.layout.ravel(wanted))


def test_a_draw_inside_a_transform_is_a_constant():
    outside = there(KEY, 3, "normal")
    for distribution in ("normal", "rademacher"):
        wanted = there(KEY, 3, distribution)

        def scaled(a, distribution=distribution):
            return a * there(KEY, 3, distribution)

        mapped = torch.func.vmap(scaled)(torch.tensor([1.0, 2.0]))
        assert torch.equal(mapped, torch.stack([wanted, 2 * wanted]))
        assert torch.equal(torch.func.jvp(scaled, (torch.tensor(1.0),), (torch.tensor(1.0),))[1], wanted)
        assert torch.equal(torch.func.jacrev(scaled)(torch.tensor(1.0)), wanted)
    with torch.inference_mode():
        assert torch.equal(there(KEY, 3, "normal"), outside)
        assert torch.equal(fs.normal(KEY, torch.zeros(3)), outside)


def test_numbers_are_made_where_they_are_used():
    like = torch.empty(3 * BLOCK, device="meta")
    for make in (fs.normal, fs.rademacher, uniform):
        assert make(KEY, like).device == like.device
        assert make(KEY, like.bfloat16()).dtype == torch.bfloat16
    assert keys.drawn_on(KEY, like.device) == like.device
    assert keys.drawn_on(fs.key(5), like.device) == CPU
    with pytest.raises(ValueError, match="`out` is on meta"):
        fill(fs.key(5), like, "normal")


def test_the_stream_of_the_cpu_is_as_it_was_recorded():
    wanted = [-0.6995713710784912, -0.12316867709159851, 2.224576234817505, 0.2183806151151657]
    assert draw(fs.key(0), BLOCK + 4, "normal")[BLOCK:].tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_study_takes_the_stream_and_keeps_its_cells_apart(tmp_path):
    cache, source = Cache(tmp_path), InMemory({"data": loss_of("mlp")}, "model", content="1")
    chosen = [metric("hessian_trace").configured(num=2), metric("gradient_flow")]
    config = UnifiedConfig(metrics=("hessian_trace",), stream="device")
    assert config.options().key == fs.key(42, stream="device")
    made = {}
    for options in (Options(), config.options()):
        made[options.stream] = run(chosen, [source], cache=cache, options=options)
        again = run(chosen, [source], cache=cache, options=options)
        assert [each.content for each in again] == [each.content for each in made[options.stream]]
    (here, same), (there_, other) = made["cpu"], made["device"]
    assert there_.content == {**here.content, "stream": "device"}
    assert same.content == other.content  # draws nothing
    assert there_.result == here.result  # of signs, which are the same
    with pytest.raises(ValueError, match="`stream` must be one of 'cpu', 'device', got 'gpu'"):
        UnifiedConfig(stream="gpu")
