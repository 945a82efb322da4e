"""Induction heads: the data, the scores against plain loops, a run that can be interrupted, and that the heads grow."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from problems import seeded
from torch.testing import assert_close

import funcscope as fs
from funcscope import cli
from funcscope.core.store import Damaged
from funcscope.families import induction
from funcscope.families.induction import Config
from funcscope.study import induction_demo
from funcscope.study.results import Results

TINY = Config(
    hidden_size=8, num_heads=2, vocab_size=9, shortest=2, longest=4, batch_size=4, num_scored=6, steps=6, seed=3
)
STEPS = (0, 2, 6)


def params_of(model):
    return {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}


def test_the_data_are_a_beginning_and_a_block_that_repeats():
    config = dataclasses.replace(TINY, num_scored=200)
    rows, periods = induction.repeated(fs.key(0), 200, config)
    assert rows.shape == (200, 9)
    assert set(periods.tolist()) == {2, 3, 4}
    for row, period in zip(rows.tolist(), periods.tolist(), strict=True):
        assert row[0] == 9
        assert all(0 <= token < 9 for token in row[1:])
        assert row[1 + period :] == row[1:-period]
    splits = {split: induction.data(config, split)["input_ids"] for split in ("train", "test", "probe")}
    assert not splits["train"].equal(splits["test"])
    assert splits["probe"][:, 1:5].equal(splits["probe"][:, 5:])
    assert splits["train"].equal(seeded(9, lambda: induction.data(config, "train"))["input_ids"])
    other = induction.data(dataclasses.replace(config, seed=4), "train")["input_ids"]
    assert not other.equal(splits["train"])


@pytest.mark.parametrize("mlp", [False, True])
def test_without_mlps_the_model_is_attention_alone_and_nothing_of_them_is_trained(mlp):
    config = dataclasses.replace(TINY, mlp=mlp)
    net, inputs = induction.network(config), induction.data(config, "probe")
    seen = fs.trace(net, net.params, inputs, ["mlp_out", "resid_mid", "resid_post"])
    assert bool(seen["mlp_out"].any()) == mlp
    assert seen["resid_mid"].equal(seen["resid_post"]) != mlp
    assert any("mlp" in name for name in net.params) == mlp
    again = seeded(99, lambda: induction.network(config))
    assert net.theta.equal(again.theta)


@torch.no_grad()
def by_loops(model, tokens, period):
    """Oracle: the model's own attention and loss, entry by entry."""
    model.config._attn_implementation = "eager"
    out = model.eval()(tokens, output_attentions=True)
    nats = -out.logits.double().log_softmax(-1)
    loss = [[float(nats[i, t - 1, tokens[i, t]]) for t in range(1, 1 + 2 * period)] for i in range(len(tokens))]
    known = range(1, period)
    first, second = ([np.mean([row[start + j] for j in known]) for row in loss] for start in (0, period))

    def best(layers, pairs):
        of = {
            (layer, head): [np.mean([float(a[i, head, q, k]) for q, k in pairs]) for i in range(len(tokens))]
            for layer, a in enumerate(out.attentions[:layers])
            for head in range(a.shape[1])
        }
        return max(of.values(), key=np.mean)

    late = range(period + 1, 2 * period + 1)
    looks = [(q, next(k for k in range(period + 1, 0, -1) if k - 1 == q - period)) for q in late]
    assert all((tokens[:, k - 1] == tokens[:, q]).all() for q, k in looks)  # the definition: t[k - 1] = t[q]
    rows = [
        second,
        np.subtract(first, second),
        best(None, looks),
        best(1, [(q, q - 1) for q in range(1, 2 * period + 1)]),
    ]
    return [fs.core.estimate.Estimate.of(torch.tensor(np.asarray(row))) for row in rows]


def test_the_scores_are_those_of_plain_loops():
    model = seeded(5, lambda: induction.make(TINY))
    with torch.no_grad():
        for param in params_of(model).values():
            param += 0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel()))
    tokens = induction.data(TINY, "probe")["input_ids"]
    ours = induction.scores(induction.FAMILY.network(TINY), params_of(model), tokens, 4)
    for one, other in zip(ours, by_loops(model, tokens, 4), strict=True):
        assert_close(one.value, other.value, rtol=1e-5, atol=1e-6)
        assert_close(one.stderr, other.stderr, rtol=1e-4, atol=1e-6)


def test_uniform_attention_has_the_stated_scores():
    model = induction.make(TINY)
    params = {name: torch.zeros_like(p) if "q_proj" in name else p for name, p in params_of(model).items()}
    got = induction.scores(induction.network(TINY), params, induction.data(TINY, "probe")["input_ids"], 4)
    assert_close(float(got.induction.value), sum(1 / (q + 1) for q in range(5, 9)) / 4, rtol=1e-6, atol=0)
    assert_close(float(got.previous.value), sum(1 / (q + 1) for q in range(1, 9)) / 8, rtol=1e-6, atol=0)
    assert_close(float(got.induction.value), math.log(2) / 4, rtol=0.25, atol=0)
    with pytest.raises(ValueError, match=r"`tokens` must be of 1 \+ 2 \* 3 positions, got 9"):
        induction.scores(induction.network(TINY), params, induction.data(TINY, "probe")["input_ids"], 3)


def stored(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "checkpoints").iterdir())}


@pytest.mark.slow
def test_interrupted_and_resumed_is_the_uninterrupted_run_byte_for_byte(tmp_path):
    curves = list(induction.train(TINY, tmp_path / "whole", STEPS))
    assert [point.step for point in curves] == [0, 2, 6]
    run = induction.train(TINY, tmp_path / "cut", STEPS)
    for _ in range(2):
        next(run)
    run.close()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert list(induction.train(TINY, tmp_path / "cut", STEPS)) == curves
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")
    net = induction.network(TINY)
    for split, at in (("train", "train_loss"), ("test", "test_loss")):
        for point in (curves[0], curves[1], curves[-1]):
            kept = induction.checkpoint(TINY, tmp_path / "whole", point.step)
            loss = induction.FAMILY.loss(net, TINY, split)(kept.params)
            assert_close(float(loss), getattr(point, at), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="belongs to another run"):
        induction.checkpoint(dataclasses.replace(TINY, seed=9), tmp_path / "whole", 6)
    last = induction.path(tmp_path / "cut", 6)
    last.write_bytes(last.read_bytes()[:200])
    with pytest.raises(Damaged, match=r"step_00006.safetensors is damaged"):
        list(induction.train(TINY, tmp_path / "cut", STEPS))


def test_a_configuration_that_makes_no_sequences_is_refused():
    for wrong in ({"longest": 3, "shortest": 4}, {"vocab_size": 1}, {"steps": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be an integer of at least"):
            Config(**wrong)
    assert Config().name != Config(seed=1).name
    assert induction.schedule(Config(steps=100), 40) == (0, 40, 80, 100)


@pytest.mark.slow
def test_the_demo_measures_every_checkpoint_and_writes_its_page(tmp_path, capsys, monkeypatch):
    configs = {"two": TINY, "one": dataclasses.replace(TINY, num_layers=1)}
    settings = induction_demo.InductionSettings(configs, gap=3, n_samples=2)
    monkeypatch.setattr(induction_demo, "QUICK", settings)
    monkeypatch.setattr(induction_demo, "INDUCTION", {"training_curves": {}, "induction_curves": {}, "mean_loss": {}})
    call = ["demo", "--family", "induction", "--quick", "--out", str(tmp_path), "--seed", "7"]
    assert cli.main(call) == 0
    out, _ = capsys.readouterr()
    results = Results.open(tmp_path)
    assert not results.failed
    assert sum(o.metric == "mean_loss" for o in results.outcomes) == 2 * 3
    assert len(re.findall(r"^induction-attention-[12]L-seed7 +[036] ", out, re.M)) == 6
    page = (tmp_path / "induction.html").read_text()
    assert "Induction heads, and when they grow" in page
    assert len(re.findall(r"induction-attention-[12]L-seed7: at the end the second copy costs", page)) == 2
    curves = next(o.result for o in results.outcomes if o.metric == "induction_curves")
    own = list(induction.train(dataclasses.replace(TINY, seed=7), tmp_path / results.outcomes[0].group, (0, 3, 6)))
    assert curves.gain.tolist() == [point.gain for point in own]
    assert curves.gain_stderr.tolist() == [point.gain_stderr for point in own]
    assert curves.coords["step"] == [0, 3, 6]


def grown(values, share=0.5):
    return next(i for i, value in enumerate(values) if value >= share * values[-1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["two_layers", "llama"])
def test_the_gain_comes_when_the_induction_head_does(tmp_path, name, seed):
    """Two layers: both rise within some fifty steps, between a plateau and a second copy that is known."""
    config = dataclasses.replace(induction.CONFIGS[name], seed=seed)
    points = list(induction.train(config, tmp_path, (config.steps,)))
    gain, score, previous = ([getattr(p, each) for p in points] for each in ("gain", "induction", "previous"))
    assert score[-1] > 0.8
    assert previous[-1] > 0.6
    assert gain[-1] > 4
    assert points[-1].second_loss < 0.15
    assert abs(grown(gain) - grown(score)) <= 2  # in points, of 25 steps each
    assert max(value for value, s in zip(gain, score, strict=True) if s < 0.1) < 1.5
    assert min(value for value, s in zip(gain, score, strict=True) if s > 0.7) > 3
    kept = induction.checkpoint(config, tmp_path, config.steps)
    pattern = fs.trace(induction.network(config), kept.params, induction.data(config, "probe"), ["pattern"])["pattern"]
    q = torch.arange(17, 33)
    duplicate = pattern[..., q, q - 16].mean((1, 3))  # negative control: the earlier occurrence itself
    assert float(duplicate[1].max()) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_layer_grows_no_induction_head(tmp_path, seed):
    """It learns which tokens are in the block, worth ln(V / P) = 1.4, and at which distances; not which comes next."""
    config = dataclasses.replace(induction.CONFIGS["one_layer"], seed=seed)
    points = list(induction.train(config, tmp_path, (config.steps,)))
    assert max(point.induction for point in points) < 0.3
    assert max(point.gain for point in points) < 2
    assert min(point.second_loss for point in points) > 2.3
