"""Modular addition: the right data, a run that can be interrupted, and that it groks."""

import dataclasses
import itertools

import pytest
import torch
from problems import seeded
from torch.testing import assert_close

from funcscope.core.store import Damaged, load
from funcscope.families import modular
from funcscope.families.modular import Config, ModularAddition

TINY = Config(p=7, d_model=8, num_heads=2, d_mlp=16, steps=60, train_fraction=0.6)
STEPS = (0, 20, 50, 60)


def test_the_data_are_all_pairs_once_with_their_sums():
    splits = [modular.data(TINY, split) for split in ("train", "test")]
    tokens, answers = (torch.cat(parts) for parts in zip(*splits, strict=True))
    assert {(int(a), int(b)) for a, b, _ in tokens} == set(itertools.product(range(7), repeat=2))
    assert (tokens[:, 2] == 7).all()
    assert all(int(y) == (int(a) + int(b)) % 7 for (a, b, _), y in zip(tokens, answers, strict=True))
    assert len(splits[0][1]) == round(0.6 * 49)
    other = modular.data(dataclasses.replace(TINY, seed=2), "train")[0]
    assert not torch.equal(other, splits[0][0])


def full_transformer(model: ModularAddition, tokens: torch.Tensor) -> torch.Tensor:
    """Oracle: all three positions, torch's own attention with a causal mask, read at the end."""
    heads = lambda x: x.unflatten(-1, (model.num_heads, -1)).transpose(1, 2)  # noqa: E731
    x = model.embed.weight[tokens] + model.position
    q, k, v = (heads(proj(x)) for proj in (model.q_proj, model.k_proj, model.v_proj))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + model.o_proj(mixed.transpose(1, 2).flatten(2))
    x = x + model.mlp_out(model.mlp_in(x).relu())
    return model.unembed(x)[:, -1]


def test_computing_the_last_position_only_changes_nothing():
    model = modular.make(Config()).double()
    tokens, _ = modular.data(Config(), "test")
    assert_close(model(tokens[:50]), full_transformer(model, tokens[:50]))


def test_the_untrained_model_has_the_stated_scale_and_touches_no_generator():
    model = modular.make(Config())
    assert_close(float(model.mlp_in.weight.detach().std()), 64**-0.5, rtol=0.03, atol=0)
    assert not model.mlp_in.bias.any()
    again = seeded(99, lambda: modular.make(Config()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def stored(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "checkpoints").iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0, 3, 5, 6])
def test_interrupted_and_resumed_is_the_uninterrupted_run_byte_for_byte(tmp_path, stop):
    curves = list(modular.train(TINY, tmp_path / "whole", STEPS))
    run = modular.train(TINY, tmp_path / "cut", STEPS)
    for _ in range(stop):
        next(run)
    run.close()
    resumed = list(modular.train(TINY, tmp_path / "cut", STEPS))
    assert resumed == curves
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")
    assert [point.step for point in curves] == list(range(0, 61, 10))
    before = stored(tmp_path / "whole")
    assert list(modular.train(TINY, tmp_path / "whole", STEPS)) == curves  # finished: nothing is trained again
    assert stored(tmp_path / "whole") == before


def test_checkpoints_off_the_grid_of_ten_and_missing_ones_are_made_with_the_same_bits(tmp_path):
    config = dataclasses.replace(TINY, steps=25)
    curves = list(modular.train(config, tmp_path, (0, 15, 25)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert list(modular.train(config, tmp_path, (0, 15, 25))) == curves
    modular.path(tmp_path, 15).unlink()
    assert list(modular.train(config, tmp_path, (0, 15, 25))) == curves
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


def test_a_checkpoint_is_the_model_at_that_step(tmp_path):
    curves = list(modular.train(TINY, tmp_path, STEPS))
    net = modular.network(TINY)
    for step in STEPS:
        kept = modular.checkpoint(TINY, tmp_path, step)
        for split, loss in (("train", curves[step // 10].train_loss), ("test", curves[step // 10].test_loss)):
            assert_close(float(modular.FAMILY.loss(net, TINY, split)(kept.params)), loss, rtol=1e-6, atol=0)


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    list(modular.train(TINY, tmp_path, STEPS))
    last = modular.path(tmp_path, 60)
    with pytest.raises(ValueError, match="belongs to another run"):
        modular.checkpoint(dataclasses.replace(TINY, seed=9), tmp_path, 60)
    last.write_bytes(last.read_bytes()[:500])
    with pytest.raises(Damaged, match=r"step_00060.safetensors is damaged"):
        list(modular.train(TINY, tmp_path, STEPS))
    last.unlink()
    assert len(list(modular.train(TINY, tmp_path, STEPS))) == 7
    assert load(last).meta["step"] == 60


def test_the_moments_of_the_optimiser_have_no_denormal_numbers(tmp_path):
    config = dataclasses.replace(TINY, steps=400, weight_decay=2.0)
    list(modular.train(config, tmp_path, (400,)))
    arrays = load(modular.path(tmp_path, 400)).arrays
    moments = torch.cat([value.abs().flatten() for name, value in arrays.items() if name.startswith("exp")])
    assert not ((moments > 0) & (moments < 1e-30)).any()


def test_the_schedule_is_what_it_says():
    for num, steps in ((24, 5000), (6, 100), (30, 5000), (8, 10)):
        kept = modular.schedule(Config(steps=steps), num)
        assert len(kept) <= num
        assert kept[0] == 0
        assert kept[-1] == steps
        assert list(kept) == sorted(set(kept))
        assert all(step % modular.EVERY == 0 for step in kept[:-1])
    assert len(modular.schedule(Config())) == 24


@pytest.mark.slow
def test_the_network_memorises_first_and_generalises_later(tmp_path):
    """p = 53, 40 % of the pairs: training accuracy 1 long before test accuracy 0.999."""
    points = list(modular.train(Config(), tmp_path, (Config().steps,)))
    memorised = next(point for point in points if point.train_accuracy == 1)
    generalised = next(point for point in points if point.test_accuracy >= 0.999)
    assert memorised.step < 200
    assert memorised.test_accuracy < 0.4
    assert generalised.step > 3 * memorised.step
    assert points[-1].test_accuracy >= 0.99
