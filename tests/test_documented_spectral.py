"""The documented call for spectra of the Fisher matrix: its thirteen points, and what its formulas got wrong."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from problems import gpt2, llama, mlp, seeded, tokens
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import funcscope as fs
from funcscope.documented import FisherSpectral, SpectralConfig
from funcscope.documented.fisher_spectral import WORKSPACE, deterministic

QUICK = SpectralConfig(folds=4)
POINTS = seeded(1, lambda: (torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))))


def small():
    return seeded(0, mlp).double()


def compute(model=None, batch=POINTS, config=QUICK, **options):
    return FisherSpectral(config).compute_fisher_spectrum(model or small(), batch, **options)


def row_of(model, ids, loss):
    """The gradient of one sequence by plain autograd, as one vector."""
    parts = torch.autograd.grad(loss(model(input_ids=ids[None]).logits[0], ids), list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def shifted(logits, ids):
    return F.cross_entropy(logits[:-1], ids[1:], reduction="sum")


def copied(logits, ids):
    return F.cross_entropy(logits, ids, reduction="sum")


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_causal_model_is_scored_on_its_next_tokens_summed_over_each_sequence(make):
    """E15 and point 1. Oracle: a loop over sequences without padding; the documented loss is that of copying."""
    model, batch = seeded(0, make).double().eval(), tokens(1, 3, 7, pad=3)
    lengths = batch["attention_mask"].sum(1)
    found = compute(model, batch, block_structure="none")["global"]
    each = [ids[:n] for ids, n in zip(batch["input_ids"], lengths, strict=True)]
    traces = {
        loss: float(torch.stack([row_of(model, ids, loss) for ids in each]).square().sum() / 3)
        for loss in (shifted, copied)
    }
    tolerance = 1e-9 if make is gpt2 else 1e-4  # which takes norms in float32
    assert found["trace"] == pytest.approx(traces[shifted], rel=tolerance)
    assert abs(found["trace"] / traces[copied] - 1) > 0.1
    means = [row_of(model, ids, shifted) / (len(ids) - 1) for ids in each]  # the "before" of the document
    assert found["trace"] > 5 * float(torch.stack(means).square().sum() / 3)


def test_it_is_the_direct_call_in_the_documented_dictionary():
    model = small()
    loss = fs.objective(fs.functional(model), [POINTS], fs.classification)
    direct = fs.fisher_spectrum(loss, loss.net.theta, key=fs.key(42), by="layer", folds=4, top_k=100)
    found = compute(model)
    assert list(found["per_block"]) == direct.blocks == ["0", "2"]
    for i, row in enumerate(found["per_block"].values()):
        assert row["largest_eigenvalue"] == float(direct.largest_eigenvalue[i])
        assert row["largest_eigenvalue_stderr"] == float(direct.largest_eigenvalue_stderr[i])
        assert row["spectral_gap"] == row["largest_eigenvalue"] - row["second_eigenvalue"]
        assert row["trace"] == pytest.approx(sum(row["top_eigenvalues"]))
        assert {"condition_number", "effective_rank", "spectral_rank", "participation_ratio"} <= row.keys()
    assert found["global"]["trace"] == float(direct.global_trace.value)
    assert found["global"]["n_parameters"] == loss.layout.num
    assert found["coupling"]["coupling"].shape == (2, 2)
    json.dumps(found["per_block"])
    meta = found["metadata"]
    assert (meta["n_samples_requested"], meta["n_samples_used"], meta["sample_unit"]) == (None, 9, "sequence")
    assert (meta["centered"], meta["use_deterministic"], meta["subsample_fraction"]) == (False, False, 1.0)


def test_names_and_defaults_are_the_documented_ones():
    call = inspect.signature(FisherSpectral.compute_fisher_spectrum).parameters
    assert list(call) == [
        "self", "model", "batch", "n_samples", "block_structure", "center_gradients", "precomputed_gradients",
    ]  # fmt: skip
    config = SpectralConfig()
    assert (config.use_deterministic, config.eigensolve_device, config.top_k_eigenvalues) == (False, "auto", 100)
    assert not hasattr(config, "use_vmap")  # point 13
    with pytest.raises(ValueError, match="`top_k_eigenvalues` must be an integer of at least 1, got 0"):  # point 7
        SpectralConfig(top_k_eigenvalues=0)


@pytest.mark.parametrize("given", [True, False])
def test_centring_is_honoured_wherever_gradients_come_from(given):
    """Point 4, and E16: centred by 1 / (n - 1)."""
    model = small()
    loss = fs.objective(fs.functional(model), [POINTS], fs.classification)
    rows = fs.per_sample_gradients(loss, loss.net.theta)
    options = {"precomputed_gradients": rows} if given else {}
    plain, centred = (compute(model, center_gradients=on, **options)["global"] for on in (False, True))
    assert plain["trace"] == pytest.approx(float(rows.square().sum() / 9))
    assert centred["trace"] == pytest.approx(float(rows.var(0).sum()))
    assert (plain["rank_bound"], centred["rank_bound"]) == (9, 8)
    assert compute(model, center_gradients=True, **options)["metadata"]["centered"] is True


def test_nothing_is_added_to_the_spectrum_and_no_coordinate_is_left_out():
    """Point 3 and E16: eigenvalues below any regulariser are themselves, and more samples than P / 4 change nothing."""
    gradients = torch.diag(torch.tensor([1.0, 1e-3, 1e-6, 1e-9], dtype=torch.float64))
    model = seeded(0, lambda: nn.Linear(4, 1, bias=False)).double()
    found = compute(model, None, precomputed_gradients=gradients)["global"]
    wanted = [x**2 / 4 for x in (1.0, 1e-3, 1e-6)]
    assert found["top_eigenvalues"][:3] == pytest.approx(wanted, rel=1e-4)
    assert compute(model, None, precomputed_gradients=gradients[:2])["global"]["condition_number"] == pytest.approx(1e6)


def test_the_first_samples_and_no_more_than_there_are():
    for num, used in ((4, 4), (50, 9)):
        meta = compute(n_samples=num)["metadata"]
        assert (meta["n_samples_requested"], meta["n_samples_used"]) == (num, used)
    loss = fs.objective(fs.functional(small()), [POINTS], fs.classification)
    rows = torch.eye(6, loss.layout.num, dtype=torch.float64)
    assert compute(precomputed_gradients=rows, n_samples=4)["global"]["trace"] == 1.0
    assert len(compute(precomputed_gradients=rows)["global"]["top_eigenvalues"]) == 6  # of 100 asked for


def test_tokens_as_samples_are_called_so():
    model, batch = seeded(0, gpt2).double(), tokens(1, 3, 7)
    found = compute(model, batch, SpectralConfig(folds=4, sample_unit="token"))["metadata"]
    assert (found["sample_unit"], found["n_samples_used"], found["n_independent"]) == ("token", 18, 3)


@pytest.mark.parametrize("empty", [[], torch.zeros(0, 51)])
def test_an_empty_input_is_refused_in_a_sentence(empty):
    with pytest.raises(ValueError, match="`gradients` is empty: there is no sample"):
        compute(precomputed_gradients=empty)
    with pytest.raises(ValueError, match="give a `batch`, or `precomputed_gradients`"):
        FisherSpectral().compute_fisher_spectrum(small())
    with pytest.raises(ValueError, match="hold no sequence"):
        compute(batch=(torch.zeros(0, 4).double(), torch.zeros(0, dtype=torch.long)))


def test_gradients_of_another_model_are_refused_by_name():
    other = [{"0.weight": torch.zeros(6, 5)}]
    with pytest.raises(ValueError, match=r"missing: \['0.bias', '2.bias', '2.weight'\]"):
        compute(precomputed_gradients=other)


def test_determinism_is_for_the_time_of_the_call(monkeypatch):
    """Point 5: and what was set before is put back, whatever happens."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    seen = []
    with pytest.raises(KeyError), deterministic(True):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ[WORKSPACE]))
        raise KeyError
    assert seen == [(True, ":4096:8")]
    assert not torch.are_deterministic_algorithms_enabled()
    assert WORKSPACE not in os.environ
    monkeypatch.setenv(WORKSPACE, ":16:8")
    config = SpectralConfig(folds=4, use_deterministic=True)
    found = compute(config=config)
    assert os.environ[WORKSPACE] == ":16:8"
    assert found["metadata"]["use_deterministic"] is True
    assert found["per_block"] == compute()["per_block"]


def test_models_are_evaluated_as_in_eval_mode_and_batch_norm_is_named():
    """Point 12."""
    model = seeded(0, lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))).double().train()
    before = model[1].running_mean.clone()
    found = compute(model)
    assert found["metadata"]["batch_norm"] == "stored statistics (eval mode)"
    assert found["global"] == compute(model.eval())["global"]
    assert torch.equal(before, model[1].running_mean)
    assert compute()["metadata"]["batch_norm"] == "none"


def test_eigenvalues_are_solved_where_it_is_asked_for(monkeypatch):
    """Point 8."""
    devices, real = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: devices.append(x.device.type) or real(x))
    for device in ("auto", "cpu"):
        found = compute(config=SpectralConfig(folds=4, eigensolve_device=device))
        assert found["metadata"]["eigensolve_device"] == device
    assert set(devices) == {"cpu"}


CODE = """
import json, torch
from funcscope.documented import FisherSpectral, SpectralConfig
torch.manual_seed(0)
model, batch = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)), torch.randn(9, 4)
found = FisherSpectral(SpectralConfig(folds=20)).compute_fisher_spectrum(model, (batch, torch.arange(9) % 3))
print(json.dumps([found["per_block"], found["global"], hash("layer_0")]))
"""


@pytest.mark.slow
def test_two_processes_with_other_hash_seeds_give_the_same_bits():
    """Point 2."""
    told = []
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", CODE], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        told.append(json.loads(run.stdout))
    assert told[0][:2] == told[1][:2]
    assert told[0][2] != told[1][2]  # negative control: what the document seeded with


def test_the_closed_form_of_a_linear_model():
    model = nn.Linear(2, 1, bias=False, device="meta").to_empty(device="cpu").double()
    gradients = [{"weight": torch.tensor([[3.0, 0.0]]).double()}, {"weight": torch.tensor([[0.0, 4.0]]).double()}]
    found = compute(model, None, precomputed_gradients=gradients, block_structure="tensor")
    row = found["per_block"]["weight"]
    assert_close(row["top_eigenvalues"], [8.0, 4.5])
    assert (row["trace"], row["spectral_gap"]) == (12.5, 3.5)
    assert row["condition_number"] == pytest.approx(8 / 4.5)
    assert row["participation_ratio"] == pytest.approx(12.5**2 / (64 + 4.5**2))
