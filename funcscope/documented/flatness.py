"""`compute_landscape_flatness` as documented."""

from __future__ import annotations

import functools
import secrets
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core.keys import key
from ..landscape.flatness import flatness
from .scoring import check_no_own_model, loss_of


def compute_landscape_flatness(
    model: nn.Module,
    probe: Any,
    loss_fn: Callable[[nn.Module, Any], Any] | None = None,
    n_directions: int = 50,
    epsilon: float = 0.1,
    seed: int | None = None,
) -> dict[str, np.ndarray]:
    r"""How much the loss rises in random steps of length epsilon around the model's weights, as the documented dictionary.

    $$\Delta_i = L(\theta + \epsilon d_i) - L(\theta), \qquad d_i = z_i / \|z_i\|, \quad z_i \sim N(0, I).$$

    A short call of `landscape.flatness`, whose docstring has assumptions and what the numbers do not say; its result has
    both sides, standard errors and the documented statistics, too. Returns `baseline_loss` (), `delta_losses`
    (n_directions,) and `epsilon` (), in float32 as documented, after differences in float64; in the loss's unit. The model
    is not touched, whatever happens; it is in eval mode here whatever mode it is in, and parameters with `requires_grad`
    False are not perturbed.

    probe: what `loss_fn` takes as its second argument.
    loss_fn: `loss_fn(model, probe)`, a scalar tensor or a number. It must use the model that it is given. Where losses are
    small, it should end in float64: `model(probe).double()` before the log-softmax.
    seed: None takes a fresh one from the operating system, which is not returned: pass one to have the same numbers again,
    and the same directions at every checkpoint. Torch's and numpy's global generators are neither set nor used, so that the
    documented system's draws cannot be had again.

    Raises ValueError where `loss_fn` is missing (nothing is computed in its place), where it holds a model of its own, for an
    epsilon or a number of directions that is not positive, and where the loss is not finite or not the same twice; TypeError
    where it returns neither a scalar tensor nor a number. Warns where the loss is the same along every direction.

    Hochreiter, Schmidhuber (1997), Flat minima, doi:10.1162/neco.1997.9.1.1.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> found = compute_landscape_flatness(model, torch.eye(2), lambda m, x: m(x).square().sum().item(), seed=0)
    >>> found["delta_losses"].shape, found["delta_losses"].dtype, sorted(found)
    ((50,), dtype('float32'), ['baseline_loss', 'delta_losses', 'epsilon'])
    """
    if loss_fn is None:
        raise ValueError(
            "`loss_fn` is missing: pass `loss_fn(model, probe)`, the loss that the model is trained on. Nothing else says "
            "which labels and which loss belong to `probe`."
        )
    check_no_own_model(model, loss_fn)
    loss = loss_of(model, probe, functools.partial(_as_tensor, loss_fn))
    result = flatness(
        loss,
        loss.net.theta,
        key=key(secrets.randbits(53) if seed is None else seed),
        n_directions=n_directions,
        epsilon=epsilon,
        two_sided=False,
        chunk=1,  # a number can be taken out of a loop, not out of a `vmap`
    )
    if not result.delta_losses.any():
        warnings.warn(
            "the loss is equal along every direction: does `loss_fn` use the model it is given?", stacklevel=2
        )
    found = {"baseline_loss": result.baseline_loss, "delta_losses": result.delta_losses.numpy(), "epsilon": epsilon}
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def _as_tensor(loss_fn: Callable[[nn.Module, Any], Any], model: nn.Module, probe: Any) -> Any:
    """The loss as a tensor in float64 where it is a number; what is neither is left to the caller's check."""
    out = loss_fn(model, probe)
    number = (isinstance(out, Real) and not isinstance(out, bool)) or (isinstance(out, np.ndarray) and out.ndim == 0)
    return torch.tensor(float(out), dtype=torch.float64) if number else out
