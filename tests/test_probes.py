"""Usable information. Oracles: closed forms of known distributions, scikit-learn by hand, fits that are wrong on purpose."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from funcscope.core.keys import fold_in, key, normal, uniform
from funcscope.core.standard_errors import ratio_stderr
from funcscope.information import information_profile, probe_selectivity, usable_information
from funcscope.information.held_out import folds_of, held_out
from funcscope.information.probes import control_labels

KEY = key(0)


def rows(num=300, dim=4, groups=30, noise=1.0, seed=0):
    """Labels by the sign of the first unit and noise; groups of unequal size."""
    k = key(seed)
    x = normal(fold_in(k, 0), torch.zeros(num, dim, dtype=torch.float64))
    labels = (x[:, 0] + noise * normal(fold_in(k, 1), x[:, 0]) > 0).long()
    return x, labels, (groups * uniform(fold_in(k, 2), torch.zeros(num)).square()).long()


def test_information_is_that_of_scikit_learn_by_hand():
    x, labels, groups = rows()
    found = usable_information(x, labels, key=KEY, groups=groups)
    log_q, hit = np.zeros(300), np.zeros(300)
    for train, test in folds_of(groups, 5, KEY):
        assert not set(groups[train].tolist()) & set(groups[test].tolist())
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[train], labels[train])
        q = (len(train) * probe.predict_proba(x[test]) + 0.5) / (len(train) + 1)
        log_q[test] = np.log(q[np.arange(len(test)), labels[test]])
        hit[test] = probe.predict(x[test]) == labels[test].numpy()
    share = float(labels.double().mean())
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert found.entropy == pytest.approx(entropy, rel=1e-12)
    assert float(found.cross_entropy.value) == pytest.approx(-log_q.mean(), rel=1e-9)
    assert float(found.information.value) == pytest.approx(entropy + log_q.mean(), rel=1e-9)
    assert float(found.accuracy.value) == pytest.approx(hit.mean(), rel=1e-12)
    gain = torch.from_numpy(log_q) - torch.tensor([1 - share, share], dtype=torch.float64).log()[labels]
    index = groups.unique(return_inverse=True)[1]
    sums = torch.zeros(2, int(index.max()) + 1, dtype=torch.float64)
    sums.index_add_(1, index, torch.stack([gain, torch.ones(300)]))
    assert float(found.information.stderr) == pytest.approx(float(ratio_stderr(sums[0], sums[1])), rel=1e-9)
    assert found.information.num == len(groups.unique())


def test_information_of_a_logistic_model_is_its_closed_form():
    """Labels by p = sigmoid(3 x): I(X; Y) by quadrature, which many rows reach and none exceeds by more than chance."""
    x = normal(key(1), torch.zeros(4000, 1, dtype=torch.float64))
    labels = (uniform(key(2), x[:, 0]) < (3 * x[:, 0]).sigmoid()).long()
    found = usable_information(x, labels, key=KEY)
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    cost = np.logaddexp(0, -3 * nodes)  # -log p
    conditional = 2 * (weights * np.exp(-cost) * cost).sum() / math.sqrt(2 * math.pi)
    assert abs(float(found.information.value) - (math.log(2) - conditional)) < 4 * float(found.information.stderr)
    assert float(found.information.stderr) < 0.02


def test_training_cross_entropy_is_no_bound():
    """Mistake 21: with as many units as rows a probe knows all of its own labels, and of others nothing."""
    x = normal(key(3), torch.zeros(80, 100, dtype=torch.float64))
    labels = (uniform(key(4), torch.zeros(80)) < 0.5).long()
    found = usable_information(x, labels, key=KEY, regularisation=10.0)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=10.0, max_iter=1000)).fit(x, labels)
    documented = found.entropy + float(np.log(probe.predict_proba(x)[np.arange(80), labels]).mean())
    assert documented > 0.9 * found.entropy  # of labels that are independent of x
    assert float(found.information.value) < 2 * float(found.information.stderr)


def test_rows_of_a_sequence_do_not_tell_of_each_other():
    """Labels are of the sequence and x nothing but its name: folds of rows would find all, folds of sequences nothing."""
    centres = normal(key(5), torch.zeros(24, 48, dtype=torch.float64))
    label = (uniform(key(6), torch.zeros(24)) < 0.5).long()
    groups = torch.arange(24).repeat_interleave(10)
    x = centres[groups] + 0.1 * normal(key(7), torch.zeros(240, 48, dtype=torch.float64))
    whole = usable_information(x, label[groups], key=KEY, groups=groups)
    leaking = usable_information(x, label[groups], key=KEY)
    assert float(leaking.information.value) > 0.8 * leaking.entropy
    assert float(whole.information.value) < 0.1
    assert float(whole.accuracy.stderr) > 3 * float(leaking.accuracy.stderr)


def test_classes_that_count_alike_loosen_the_bound():
    """Mistake 23: class_weight='balanced' predicts other frequencies than the labels have, which costs cross-entropy."""
    x, _, groups = rows(600, noise=1.0)
    labels = (x[:, 0] + normal(key(9), x[:, 0]) > 1.8).long()  # rare
    found = usable_information(x, labels, key=KEY, groups=groups)
    log_q = np.zeros(600)
    for train, test in GroupKFold(5).split(x, groups=groups):
        probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced")).fit(
            x[train], labels[train]
        )
        log_q[test] = np.log(probe.predict_proba(x[test])[np.arange(len(test)), labels[test]])
    balanced = found.entropy + log_q.mean()
    assert balanced < float(found.information.value) - 0.05


def test_labels_are_taken_as_they_are():
    """Mistake 23: the most frequent 100 classes and "other" are other labels, of another entropy in every task."""
    labels = torch.arange(600) % 150
    x = normal(key(1), torch.zeros(600, 2, dtype=torch.float64))
    found = usable_information(x, labels, key=KEY, pca=1, folds=2)
    coarse = labels.clamp(max=100)
    assert found.entropy == pytest.approx(math.log(150), rel=1e-12)
    assert found.num_labels == 150
    assert usable_information(x, coarse, key=KEY, folds=2).entropy < found.entropy - 0.5


def test_a_class_that_no_training_fold_has_costs_what_is_said():
    x, labels, groups = rows()
    labels = torch.where(groups == groups[0], 2, labels)  # of one sequence only
    made = held_out(x, labels, groups, key=KEY)
    alone = (labels == 2).nonzero()[:, 0]
    assert made.num_absent == len(alone)
    assert made.log_prob.isfinite().all()
    train = next(train for train, test in folds_of(groups, 5, KEY) if int(alone[0]) in test)
    assert made.log_prob[alone] == pytest.approx(-math.log(3 * (len(train) + 1)), rel=1e-9)
    found = usable_information(x, labels, key=KEY, groups=groups)
    assert "absent from the training folds" in " ".join(found.notes)
    two = usable_information(x[:9], torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0]), key=KEY, folds=3)
    assert math.isfinite(float(two.information.value))  # a fold is trained on one class
    assert two.num_absent == 1


def test_one_class_is_undefined_and_says_so():
    x, labels, _ = rows(40)
    zero = torch.zeros_like(labels)
    for found in (usable_information(x, zero, key=KEY), probe_selectivity(x, zero, key=KEY)):
        assert math.isnan(float(found.information.value))
        assert "one class" in found.notes[0]
    profile = information_profile({"a": x}, zero, key=KEY)
    assert bool(profile.information.isnan().all())
    assert "one class" in profile.notes[0]


def test_miller_and_madow_add_half_a_row_per_label():
    x, labels, groups = rows()
    plain, added = (
        usable_information(x, labels, key=KEY, groups=groups, correction=each) for each in ("none", "miller_madow")
    )
    assert added.entropy - plain.entropy == pytest.approx(1 / 600, rel=1e-9)
    assert float(added.information.value - plain.information.value) == pytest.approx(1 / 600, rel=1e-9)
    assert added.cross_entropy == plain.cross_entropy


@given(st.integers(0, 10**6))
def test_folds_are_by_key_and_keep_groups_whole(seed):
    groups = (10 * uniform(key(seed), torch.zeros(60))).long()
    folds = min(4, len(groups.unique()))
    made = list(folds_of(groups, folds, key(seed)))
    assert sorted(np.concatenate([test for _, test in made]).tolist()) == list(range(60))
    for train, test in made:
        assert not set(groups[train].tolist()) & set(groups[test].tolist())
    again = list(folds_of(groups, folds, key(seed)))
    assert all((a[1] == b[1]).all() for a, b in zip(made, again, strict=True))


def test_other_keys_give_other_folds():
    groups = torch.arange(40)
    first, other = (next(folds_of(groups, 5, key(i)))[1].tolist() for i in range(2))
    assert first != other


@pytest.mark.slow
def test_errors_cover_what_fresh_samples_vary_by():
    values, errors = [], []
    for seed in range(30):
        x, labels, groups = rows(120, 2, groups=40, seed=seed)
        found = usable_information(x, labels, key=key(seed), groups=groups, folds=3)
        values.append(float(found.information.value))
        errors.append(float(found.information.stderr))
    assert np.mean(errors) / np.std(values, ddof=1) == pytest.approx(1, abs=0.4)


def test_a_control_task_over_types_is_memorised_and_one_over_groups_is_not():
    """One-hot tokens: labels that follow from types are all a matter of memory, and not selective (Hewitt and Liang)."""
    types = (8 * uniform(key(11), torch.zeros(400))).long()
    x = torch.nn.functional.one_hot(types, 8).double()
    groups = torch.arange(400) // 10
    by_types = probe_selectivity(x, types % 2, types=types, groups=groups, key=KEY)
    assert by_types.control == "types"
    assert float(by_types.accuracy.value) == float(by_types.control_accuracy.value) == 1.0
    assert float(by_types.selectivity.value) == 0.0
    by_groups = probe_selectivity(x, types % 2, groups=groups, key=KEY)
    assert float(by_groups.control_accuracy.value) < 0.65
    assert float(by_groups.control_information.value) < 0.02
    assert float(by_groups.selectivity.value) == pytest.approx(
        float(by_groups.accuracy.value - by_groups.control_accuracy.value), abs=1e-12
    )


def test_control_labels_keep_types_or_sequences():
    labels, groups = torch.arange(12), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    dealt = control_labels(labels, groups, None, key(1))
    blocks = dealt.view(4, 3)
    assert sorted(dealt.tolist()) == list(range(12))
    assert (blocks.diff(dim=1) == 1).all()  # whole sequences of labels, in their order
    assert blocks[:, 0].tolist() != [0, 3, 6, 9]
    types = torch.tensor([5, 5, 7, 7, 5, 9, 9, 7, 5, 5, 9, 7])
    drawn = control_labels(labels, groups, types, key(1))
    assert all(len(drawn[types == t].unique()) == 1 for t in (5, 7, 9))
    assert set(drawn.tolist()) <= set(labels.tolist())


def test_profile_is_each_layer_alone():
    x, labels, groups = rows(noise=0.3)
    mix = normal(key(20), torch.zeros(4, 6, dtype=torch.float64))
    layers = {"a": x, "b": x @ mix, "c": 20 + (x @ mix)[:, :2] + 5 * normal(key(21), x[:, :2])}
    found = information_profile(layers, labels, key=KEY, groups=groups)
    for i, each in enumerate(layers.values()):
        alone = usable_information(each, labels, key=KEY, groups=groups)
        assert float(found.information[i]) == pytest.approx(float(alone.information.value), rel=1e-12)
        assert float(found.information_stderr[i]) == pytest.approx(float(alone.information.stderr), rel=1e-12)
        assert float(found.accuracy[i]) == pytest.approx(float(alone.accuracy.value), rel=1e-12)
    assert found.coords == {"layer": ["a", "b", "c"]}


def test_components_are_those_of_training_rows():
    x, labels, groups = rows()
    wide = torch.cat([x, 20 * normal(key(30), torch.zeros(300, 3, dtype=torch.float64))], 1)
    all_units = usable_information(wide, labels, key=KEY, groups=groups)
    every = usable_information(wide, labels, key=KEY, groups=groups, pca=7)
    assert float(every.information.value) == pytest.approx(float(all_units.information.value), abs=1e-4)
    assert usable_information(wide, labels, key=KEY, groups=groups, pca=1).pca == 1


def test_doors():
    x, labels, groups = rows(20)
    with pytest.raises(ValueError, match="`folds` must be at most the number of groups, 2"):
        usable_information(x, labels, key=KEY, groups=torch.arange(20) // 10)
    with pytest.raises(ValueError, match="`x` must be finite"):
        usable_information(x * torch.nan, labels, key=KEY)
    with pytest.raises(ValueError, match="`labels` must be 20 integers"):
        usable_information(x, labels[:-1], key=KEY)
    with pytest.raises(ValueError, match="`groups` must say of each of 20 rows"):
        usable_information(x, labels, key=KEY, groups=groups[:-1])
    with pytest.raises(ValueError, match="`pca` must be at most the number of units, 4"):
        usable_information(x, labels, key=KEY, pca=5)
    with pytest.raises(ValueError, match="`types` must say"):
        probe_selectivity(x, labels, types=labels[:-1], key=KEY)
    with pytest.raises(ValueError, match="`labels` must be 19 integers, one per row of `layers"):
        information_profile({"a": x, "b": x[:-1]}, labels, key=KEY)
    with pytest.raises(ValueError, match="a layer at least"):
        information_profile({}, labels, key=KEY)


def test_a_control_task_of_one_label_is_undefined_and_says_so():
    x, labels, _ = rows(20)
    found = probe_selectivity(x, labels, key=KEY, types=torch.zeros(20, dtype=torch.long))
    assert math.isnan(float(found.selectivity.value))
    assert "one label for all rows" in found.notes[0]


def test_rows_of_any_size_are_probed_alike():
    x, labels, _ = rows(40)
    plain = usable_information(x, labels, key=KEY)
    for scale in (1e200, 1e-200):
        found = usable_information(scale * x, labels, key=KEY)
        assert float(found.information.value) == pytest.approx(float(plain.information.value), abs=1e-6)


def test_rows_without_units_and_sequences_without_numbers_are_refused():
    x, labels, _ = rows(20)
    with pytest.raises(ValueError, match="`x` must have the shape"):
        usable_information(x[:, :0], labels, key=KEY)
    with pytest.raises(ValueError, match="`groups` must hold one whole number per row"):
        usable_information.__wrapped__(x, labels, key=KEY, groups=torch.zeros(20))
