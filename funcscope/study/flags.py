"""Which metrics the documented flags of a configuration ask for."""

from __future__ import annotations

from collections.abc import Collection

from .metric import metric

LONG = ("learning_coefficient_sweep",)
"""Metrics that take hours on most models: measured where they are asked for by name."""
OF_TASKS = ("tasks", "experts")
"""What metrics look at that needs several data sets."""
FLAGS: dict[str, tuple[str, ...]] = {
    "compute_fisher": (
        "fisher_information",
        "fisher_importance",
        "fisher_overlap",
        "cross_task_conflicts",
        "qkov_interference",
        "fisher_methods",
    ),
    "compute_gradients": ("gradient_flow", "gradient_pathology", "gradient_trajectory"),
    "compute_information_theory": ("mutual_information", "entropy", "pid_analysis"),
    "compute_representations": ("dead_neurons", "superposition", "feature_geometry"),
    "compute_mechanistic": ("attention_patterns", "induction_heads", "qk_ov_circuits"),
    "compute_modularity": ("modularity_score", "separability", "task_interference"),
    "compute_lottery": ("pruning_robustness", "winning_tickets"),
    "compute_bombshell": ("task_vectors", "ties_merging", "fisher_merging"),
    "compute_loss_landscape": ("loss_landscape_2d",),
}
"""By flag, the documented names of the metrics that it asks for."""


def asked_by(flag: str, *, off: Collection[str], has_tasks: bool) -> list[str]:
    """The metrics of a flag, without those that are off; those that look at several data sets where there are several.

    Raises ValueError where none is left.

    >>> from funcscope.study import catalogue
    >>> asked_by("compute_mechanistic", off=("qk_ov_circuits",), has_tasks=False)
    ['attention_patterns', 'induction_heads']
    """
    wanted = [name for name in FLAGS[flag] if name not in off]
    there = [name for name in wanted if has_tasks or metric(name).on not in OF_TASKS]
    if not there:
        raise ValueError(
            f"`{flag}` asks for {', '.join(wanted)}, which look at several data sets: give them by name, "
            "`dataset_name={'prose': 'prose.jsonl', 'code': 'code.jsonl'}`."
        )
    return there
