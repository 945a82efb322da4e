"""The documented names of landscape results, and that the same call makes the same result of inputs that it leaves alone."""

import pickle

import pytest
import torch
from results import EXAMPLES, example, loss, other, sampled, theta, timed_as

import funcscope as fs

DOCUMENTED = {
    "DirectionalLosses": """baseline_loss loss_mean loss_std loss_max loss_min delta_mean delta_std landscape_roughness
        n_samples actual_span param_norm relative_step dir_grad_mean dir_grad_std dir_grad_delta_corr n_samples_for_corr
        curvature_mean curvature_std curvature_p10 curvature_p50 curvature_p90 loss_mean_negative loss_std_negative seed
        use_filter_norm global_renorm homogeneous_dtype fast_vec_path n_nonfinite_pos n_nonfinite_neg loss_mean_stderr""",
    "Flatness": """mean_delta_loss median_delta_loss max_delta_loss std_delta_loss p90_delta_loss p10_delta_loss seed
        flatness_ratio baseline_loss mean_delta_loss_stderr pair_mean second_order pair_variance_ratio two_sided""",
    "LossPlane": """grid_losses axis_values roughness normalized_roughness loss_mean loss_std loss_min loss_max
        orthogonality_check n_batches_used axis_values_2 grid_stderr grid_delta_stderr baseline_loss quad_residual
        normalized_roughness_range n_nonfinite direction_norms param_norm span actual_span displacement axis_names
        relative_displacement num_forwards axes_normalize metric_accuracy metric_accuracy_stderr metric_accuracy_baseline""",
    "LossLines": "losses delta_losses delta_stderr axis_values displacement loss_start loss_end loss_min axis_names",
    "LossPath": """coefficients losses stderr excess excess_stderr barrier_max barrier_max_stderr barrier_linear distance
        barrier_linear_stderr curvature argmax argmax_loss n_nonfinite is_connected num_forwards kind""",
    "BarrierMatrix": "barrier_max barrier_linear barrier_linear_stderr mean_barrier_max mean_barrier_linear num_forwards",
    "Connection": "reduction reduction_stderr displacement key line_barrier_max line_kind history num_gradients points",
    "Comparison": """name_first name_second level n_tests seed n_directions normalize loss_std_difference
        delta_mean_difference_low delta_mean_difference_high delta_mean_first delta_mean_first_stderr
        delta_mean_cohen_dz_stderr delta_mean_rank_biserial delta_mean_correlation""",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_names_are_there(name):
    assert set(DOCUMENTED[name].split()) <= example(name).asdict().keys()


def test_names_of_what_was_not_asked_for_are_absent():
    bare = fs.directional_losses(loss(), theta(), key=fs.key(0), n_samples=4).asdict()
    asked = {"dir_grad_mean", "curvature_mean", "loss_mean_negative", "slopes", "n_samples_for_corr"}
    assert not (asked | {"curvature_noise_floor", "n_curvatures_undecided"}) & bare.keys()
    assert asked <= sampled(theta()).asdict().keys()
    assert "loss_std_p_value" not in example("Comparison").asdict()  # no mean, no test


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_same_call_gives_the_same_bits_and_leaves_its_inputs(name):
    before, state = (theta().clone(), other().clone()), torch.get_rng_state()
    again, first = timed_as(example(name), EXAMPLES[name]()), example(name)
    assert again == first
    assert pickle.loads(pickle.dumps(again)) == again
    assert all(torch.equal(*both) for both in zip(before, (theta(), other()), strict=True))
    assert torch.equal(state, torch.get_rng_state())
