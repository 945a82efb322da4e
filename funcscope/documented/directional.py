"""`sample_directional_losses` as documented."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..landscape.directional import directional_losses
from .scoring import LossFn, key_of, loss_of, warn_where_level

ONE_SCORE = (
    "no error over sequences: `loss_fn` gives one number of the whole batch, and nothing says what each contributes."
)


def sample_directional_losses(
    model: nn.Module,
    data_batch: Any,
    n_samples: int = 50,
    span: float = 0.5,
    loss_fn: LossFn | None = None,
    use_filter_norm: bool = True,
    relative_span: bool = False,
    seed: int | None = None,
    batch_config: Any = None,
    two_sided: bool = False,
    compute_curvature: bool = False,
    global_renorm: bool = False,
    compute_gradient: bool = False,
) -> dict[str, Any]:
    r"""The loss along random directions around the model's weights, as the documented dictionary.

    `asdict()` of `landscape.directional_losses`, whose docstring has formulas, units and errors: every documented entry, the
    standard errors (`..._stderr`), and the samples as arrays. The model is not touched, whatever happens; parameters with
    `requires_grad` False are not perturbed.

    model: in eval mode here, whatever mode it is in.
    data_batch: what a tokenizer returns (`return_tensors="pt"`), a mapping, a tensor of token ids, or `(inputs, targets)`.
    What is scored follows from the class of the model: a causal LM on its own next tokens, padding excluded, or on
    `labels`. A class that says nothing is scored by cross-entropy on batches `(inputs, targets)`.
    loss_fn: scores the batch instead, as `loss_fn(model, data_batch)`, a scalar tensor. It must use the model that it is
    given, and is called by torch in the middle of derivatives: no `.item()`, no `.detach()`. Its one number says nothing
    of single sequences: errors over them are nan, and `sequences_note` says so.
    use_filter_norm: filter normalisation, or, if False, directions of norm 1, with or without `global_renorm`.
    seed: None takes a fresh one from the operating system; `result["seed"]` says which. Global generators are neither set
    nor used, so that the documented system's draws cannot be had again.
    batch_config: rows per forward pass, as an integer or as `batch_size` of a mapping or an object. The loss is the
    mean over all scored tokens, the same for every cut; a `loss_fn` cannot be cut, as its weights are its own.

    Where this differs from the document, the document is wrong. Draws are independent (there, each starts from the last
    one's weights). `global_renorm` changes the unit of the step and destroys nothing; with `use_filter_norm` it warns, with
    the numbers. No sample is dropped and no curvature set to 0 for being large. Slopes need no `loss_fn`. `relative_span`
    moves by span x ||theta||, not by its square. No entry grades the minimum: the document's bounds on roughness (0.15, 0.25)
    depend on the level of the loss and the size of the model; and its Mann-Whitney test for two models throws away that
    they were sampled along the same directions, which `landscape.compare_directional` uses.

    Raises ValueError where the batch holds no tensors, cannot be cut, or has no known score, where `loss_fn` uses the
    parameters of `model` itself, where `compute_curvature` lacks `two_sided`, and as `directional_losses` does; TypeError
    where `loss_fn` returns no scalar tensor. Warns where the loss is the same along every direction.

    Li, Xu, Taylor, Studer, Goldstein (2018), Visualizing the loss landscape of neural nets.

    >>> import torch
    >>> result = sample_directional_losses(nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), n_samples=4, seed=42)
    >>> result["n_samples"], result["seed"], round(result["relative_step"], 3), sorted(result)[:2]
    (4, 42, 0.5, ['actual_span', 'baseline_loss'])
    """
    loss = loss_of(model, data_batch, loss_fn, batch_config)
    result = directional_losses(
        loss,
        loss.net.params,
        key=key_of(seed),
        n_samples=n_samples,
        span=span,
        normalize="filter" if use_filter_norm else "global",
        relative_span=relative_span,
        global_renorm=global_renorm,
        two_sided=two_sided,
        compute_gradient=compute_gradient,
        compute_curvature=compute_curvature,
    )
    if loss_fn is None:
        return result.asdict()
    warn_where_level(result.deltas)
    return result.asdict() | {"sequences_note": ONE_SCORE}
