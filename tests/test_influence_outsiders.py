"""kronfluence's influence with Kronecker factors: the same numbers, up to the sign (bench/install_peers.sh).

Its scores are g'(F + damping)^-1 g with F per datum, positive where a datum helps; ours are derivatives of the test loss.
"""

import pytest
import torch
from problems import mlp, seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.curvature import ekfac_factors, kfac_factors, per_sample_gradients
from funcscope.curvature.kfac_factors import scored_losses
from funcscope.gradients import influence

pytestmark = [pytest.mark.outsider, pytest.mark.filterwarnings("ignore")]
DAMPING = 0.01
KINDS = ("activation_covariance", "gradient_covariance", "eigendecomposition", "lambda", "per_sample_gradient")


def problem():
    """A model of three classes, 30 data with labels and 5 questions, and both losses."""
    model = seeded(0, mlp).double()
    sets = [
        seeded(s, lambda n=n: (torch.randn(n, 4).double(), torch.randint(0, 3, (n,)))) for s, n in ((1, 30), (2, 5))
    ]
    losses = [fs.objective(fs.functional(model), [each], fs.classification) for each in sets]
    return model, sets, losses


def theirs(path, model, train, questions, strategy, labels):
    """Scores (data, questions); factors are of the third column of the data where labels are the model's."""
    analyzer_of = pytest.importorskip("kronfluence.analyzer")
    arguments = pytest.importorskip("kronfluence.arguments")
    task_of = pytest.importorskip("kronfluence.task")
    from torch.utils.data import TensorDataset

    class Classes(task_of.Task):
        def compute_train_loss(self, batch, model, sample=False):
            return nn.functional.cross_entropy(model(batch[0]), batch[2 if sample else 1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return ["0", "2"]

    task, data = Classes(), TensorDataset(*train)
    how = arguments.FactorArguments(
        strategy=strategy, use_empirical_fisher=labels == "data", **{f"{kind}_dtype": torch.float64 for kind in KINDS}
    )
    with torch.random.fork_rng():
        prepared = analyzer_of.prepare_model(model, task)
        analyzer = analyzer_of.Analyzer("a", prepared, task, cpu=True, output_dir=str(path))
        analyzer.fit_all_factors("f", data, per_device_batch_size=30, factor_args=how)
        analyzer.compute_pairwise_scores(
            "s", "f", TensorDataset(*questions), data, 5, per_device_train_batch_size=30,
            score_args=arguments.ScoreArguments(damping_factor=DAMPING),
        )  # fmt: skip
        return analyzer.load_pairwise_scores("s")["all_modules"].double().T


@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
def test_influence_from_the_same_draws_of_the_labels_is_minus_their_scores(tmp_path, strategy):
    model, (train, questions), (loss, test_loss) = problem()
    theta, key = loss.net.theta, fs.key(4)
    (drawn,) = scored_losses(loss, theta, key, "model", 1)[1]
    labels = drawn.batches[0][1].index
    assert not torch.equal(labels, train[1])
    scores = theirs(tmp_path, model, (*train, labels), questions, strategy, "model")
    found = influence(loss, test_loss, theta, key=key, method=strategy, damping=DAMPING, num=1)
    assert_close(found.values, -scores, rtol=1e-3, atol=1e-5 * float(scores.abs().max()))


@pytest.mark.parametrize(("strategy", "make"), [("kfac", kfac_factors), ("ekfac", ekfac_factors)])
def test_factors_of_the_datas_own_labels_solve_to_their_scores(tmp_path, strategy, make):
    model, (train, questions), (loss, test_loss) = problem()
    theta = loss.net.theta
    factors = make(loss, theta, labels="data")
    columns = [factors.solve(g, DAMPING) for g in per_sample_gradients(test_loss, theta)]
    ours = per_sample_gradients(loss, theta) @ torch.stack(columns).T
    scores = theirs(tmp_path, model, train, questions, strategy, "data")
    assert_close(scores, ours, rtol=1e-3, atol=1e-5 * float(ours.abs().max()))
