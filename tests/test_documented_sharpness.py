"""The documents' sharpness calls: `compute_sam_sharpness` and `compare_model_sharpness` as their code makes them."""

import inspect

import numpy as np
import pytest
import torch
from problems import dense_hessian, gpt2, mlp, problem, seeded, tokens
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.curvature.ascent_sharpness import sam_sharpness
from funcscope.documented import ICLRMetrics, ModularityMetrics, compare_model_sharpness, compute_sam_sharpness


@pytest.mark.parametrize("metrics", [ModularityMetrics(), ICLRMetrics()])
def test_the_documented_call_is_the_metric_on_the_same_batch(metrics):
    model, batches, criterion = problem("gpt2", torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss = fs.objective(fs.functional(model), batches[0], criterion)
    value = metrics.compute_sam_sharpness(model=model, batch=batches[0], epsilon=0.01)
    assert type(value) is float
    assert value == sam_sharpness(loss, loss.net.params).absolute
    adaptive = metrics.compute_sam_sharpness(model=model, batch=batches[0], epsilon=0.01, adaptive_epsilon=True)
    assert adaptive == sam_sharpness(loss, loss.net.params, adaptive_epsilon=True).absolute
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    arguments = list(inspect.signature(compute_sam_sharpness).parameters)
    assert arguments[:4] == ["model", "batch", "epsilon", "adaptive_epsilon"]


def test_the_documented_check_by_log10_fails_on_an_honest_model():
    """|log10 lambda_max - log10(S / epsilon^2)| > 1 says that the measures diverge; both are right."""
    model, batches, _ = problem("mlp")
    sam = compute_sam_sharpness(model, batches[0])
    loss = fs.objective(fs.functional(model), batches[0], fs.classification)
    largest = float(torch.linalg.eigvalsh(dense_hessian(loss, loss.net.theta))[-1])
    assert abs(np.log10(largest) - np.log10(sam / 0.01**2)) > 1
    s = sam_sharpness(loss, loss.net.theta)
    assert abs(s.remainder) < 1e-3 * sam  # the relation that holds


def test_two_models_on_all_batches_of_a_loader():
    x = fs.normal(fs.key(0), torch.zeros(11, 4))
    y = seeded(0, lambda: torch.randint(0, 3, (11,)))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    a, b = seeded(1, mlp), seeded(2, mlp)
    found = seeded(0, lambda: compare_model_sharpness(a, b, loader, epsilon=0.05))  # a loader draws a seed of its own
    losses = [fs.objective(fs.functional(m), (x, y), fs.classification) for m in (a, b)]
    sam = [sam_sharpness(loss, loss.net.theta, epsilon=0.05).absolute for loss in losses]
    top = [float(torch.linalg.eigvalsh(dense_hessian(loss, loss.net.theta))[-1]) for loss in losses]
    assert_close(found["sam_ratio"], sam[0] / sam[1], rtol=1e-4, atol=0)
    assert_close(found["eigenvalue_ratio"], top[0] / top[1], rtol=5e-3, atol=0)
    low, high = found["eigenvalue_ratio_interval"]
    assert low < top[0] / top[1] < high
    assert found["sharper_model"] == ("A" if sam[0] > sam[1] else "B")
    assert found["sharper_by_eigenvalue"] == ("A" if top[0] > top[1] else "B")
    assert found["hessian_confirms"] == (found["sharper_model"] == found["sharper_by_eigenvalue"])
    assert found["sam_ratio_stderr"] > 0
    assert_close(found["sam_difference"], sam[0] - sam[1], rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="`dataloader` has no batch"):
        compare_model_sharpness(a, b, [])


def test_two_models_that_disagree_raise_no_assertion():
    """A is confident and wrong, steep where it hardly bends; B is level, where the curvature is largest."""
    a, b = (seeded(0, lambda: nn.Linear(2, 2, bias=False)) for _ in range(2))
    with torch.no_grad():
        a.weight.copy_(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]))
        b.weight.zero_()
    data = [
        (torch.tensor([[1.0, 0.0], [-1.0, 0.2]]), torch.tensor([0, 1])),
        (torch.tensor([[0.9, 0.0]]), torch.tensor([1])),
    ]
    found = compare_model_sharpness(a, b, data)
    assert (found["sharper_model"], found["sharper_by_eigenvalue"], found["hessian_confirms"]) == ("A", "B", False)


@pytest.mark.slow
def test_language_models_are_compared_on_tokenised_batches():
    batches = [tokens(1, 2, 6), tokens(2, 1, 5)]
    models = [seeded(seed, gpt2) for seed in (1, 2)]
    losses = [fs.objective(fs.functional(model), batches, fs.causal_lm) for model in models]
    sam = [sam_sharpness(loss, loss.net.params, epsilon=0.01, curvature=False).absolute for loss in losses]
    found = compare_model_sharpness(*models, batches, epsilon=0.01)
    assert_close(found["sam_ratio"], sam[0] / sam[1])
    assert found["sharper_model"] == ("A" if sam[0] > sam[1] else "B")


def test_the_documented_spectrum_is_that_of_the_dense_hessian():
    model, batches, _ = problem("mlp")
    found = ICLRMetrics().compute_hessian_eigenvalues_lanczos(model, batches[0], k=3, tol=1e-9)
    loss = fs.objective(fs.functional(model), [batches[0]], fs.classification)
    dense = torch.linalg.eigvalsh(dense_hessian(loss, loss.net.theta)).flip(0)
    assert found["top_eigenvalues"].tolist() == pytest.approx(dense[:3].tolist())
    assert found["min_eigenvalue"] == pytest.approx(float(dense[-1]))
    assert found["trace"] == pytest.approx(float(dense.sum()))
    assert found["has_negative_eigenvalues"] == bool(dense[-1] < 0)
    assert len(ICLRMetrics().compute_hessian_eigenvalues_lanczos(model, batches[0], k=1000)["top_eigenvalues"]) == 25
