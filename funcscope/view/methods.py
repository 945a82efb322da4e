"""How the numbers of the demonstration were made: formulas, settings, keys and costs, from what is stored with them."""

from __future__ import annotations

from collections.abc import Sequence

from .numbers import number
from .page import Terms
from .story import SAM_STEP, Story


def terms(story: Story) -> Terms:
    """The block that a reader needs to make the numbers again."""
    versions = ", ".join(f"{name} {version}" for name, version in story.stored.meta["versions"].items())
    return Terms(
        [
            ("Model and data", [_model(story), _data(story)]),
            ("Training", [_training(story)]),
            ("Directions", _directions(story)),
            ("Formulas", _formulas(story)),
            ("Errors", _errors()),
            ("Cost", [_cost(story)]),
            ("Versions", [versions]),
        ]
    )


def _model(story: Story) -> str:
    c = story.config
    return (
        f"One attention layer with {c['num_heads']} heads and one ReLU layer of {c['d_mlp']} units on a width of "
        f"{c['d_model']}, no layer norm. The input is (a, b, =), the answer is read at “=”."
    )


def _data(story: Story) -> str:
    train, total = story.num_pairs
    return (
        f"All {total:,} pairs below p = {story.config['p']}: a random {train:,} to train on, {total - train:,} to "
        "test. The loss is the mean cross-entropy in nats; the landscape is that of all training pairs."
    )


def _training(story: Story) -> str:
    c = story.config
    return (
        f"{c['steps']:,} steps of full-batch AdamW, learning rate {c['learning_rate']:g}, "
        f"weight decay {c['weight_decay']:g}, betas {c['betas'][0]:g} and {c['betas'][1]:g}, seed {c['seed']}."
    )


def _directions(story: Story) -> list[str]:
    row = story.rows[-1]
    scaled = {
        "filter": "scaled so that every filter of d has the norm of the same filter of θ",
        "layer": "scaled so that every layer of d has the norm of the same layer of θ",
        "global": "scaled to norm 1",
    }[row["normalize"]]
    steps = story.column("relative_step")
    low, high = number(float(steps.min())), number(float(steps.max()))
    return [
        f"d is drawn from the {row['distribution']} distribution and {scaled}. "
        f"A span of {row['actual_span']:g} moves θ by {low if low == high else f'{low} to {high}'} of its own norm.",
        f"Seed {row['seed']}, key {row['key']}. Every checkpoint has the same draws, scaled to its own weights; "
        "the lines have draws of their own.",
    ]


def _formulas(story: Story) -> list[str]:
    return [
        f"h = {story.rows[-1]['actual_span']:g}, L₀ = L(θ), L₊ = L(θ + h d), L₋ = L(θ − h d)",
        "loss change: L₊ − L₀; slope: ∇L · d",
        "curvature: (L₊ + L₋ − 2 L₀) / h²",
        "roughness: sd(L₊) / |mean(L₊)|",
        "gradient-delta correlation: Pearson’s r of ∇L · d and L₊ − L₀",
        "rounding: 4 u max|L| / h², with u = 2⁻²⁴ the relative rounding error of float32; an order of magnitude",
        *(_hessian(story) if "sam_relative" in story.rows[0] else []),
    ]


def _hessian(story: Story) -> list[str]:
    return [
        "largest eigenvalue of ∇²L: Lanczos, to a residual of 1 % of it; trace: the mean of zᵀ∇²L z over random signs z, the "
        f"same at every checkpoint; {sum(row['hessian_products'] for row in story.rows):,} products in all, of about 6 "
        "forward passes each",
        f"relative sharpness: (L(θ + ε g / ‖g‖) − L₀) / L₀ with g = ∇L and ε = {SAM_STEP:g}, a distance",
    ]


def _errors() -> Sequence[str]:
    return [
        "Standard errors are over directions: sd / √n for means, the jackknife for standard deviations, roughness and "
        "correlation. ± in the text is one standard error, intervals in figures are 1.96 of them. "
        "They do not cover another seed of the training.",
        "The ratio of two mean curvatures x̄ / ȳ = r uses that both have the same draws: "
        "its error is sd(x − r y) / (√n ȳ).",
    ]


def _cost(story: Story) -> str:
    rows = story.rows
    forwards = sum(row["num_forwards"] for row in rows)
    gradients = sum(row["num_gradients"] for row in rows)
    lines = story.array("profile_loss").size
    return (
        f"{forwards:,} forward passes over all training pairs and {gradients:,} gradients for {len(rows)} checkpoints, "
        f"{lines:,} forward passes for the lines."
    )
