"""`compute_landscape_flatness` as documented."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn

from ..landscape.flatness import flatness
from .scoring import LossFn, key_of, loss_of, warn_where_level


def compute_landscape_flatness(
    model: nn.Module,
    probe: Any,
    loss_fn: LossFn | None = None,
    n_directions: int = 50,
    epsilon: float = 0.1,
    seed: int | None = None,
) -> dict[str, np.ndarray]:
    r"""How much the loss rises in random steps of length epsilon around the model's weights, as the documented dictionary.

    $$\Delta_i = L(\theta + \epsilon d_i) - L(\theta), \qquad d_i = z_i / \|z_i\|, \quad z_i \sim N(0, I).$$

    `baseline_loss` (), `delta_losses` (n_directions,) and `epsilon` () of `landscape.flatness`, in float32 as documented,
    after differences in float64; in the loss's unit. Its own result has both sides, standard errors and the documented
    statistics, too. Model and generators as in `sample_directional_losses`.

    probe: what `loss_fn` takes as its second argument.
    loss_fn: `loss_fn(model, probe)`, a scalar tensor or a number. It must use the model that it is given. Where losses are
    small, it should end in float64: `model(probe).double()` before the log-softmax.
    seed: None takes a fresh one, which is not returned: pass one to have the same directions at every checkpoint.

    Raises ValueError where `loss_fn` is missing (nothing is computed in its place) or uses the parameters of `model` itself,
    for an epsilon or a number of directions that is not positive, and where the loss is not finite or not the same twice;
    TypeError where it returns neither a scalar tensor nor a number. Warns where the loss is the same along every direction.

    Hochreiter, Schmidhuber (1997), Flat minima, doi:10.1162/neco.1997.9.1.1.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> rises = compute_landscape_flatness(model, torch.eye(2), lambda m, x: m(x).square().sum().item(), seed=0)
    >>> rises["delta_losses"].shape, rises["delta_losses"].dtype, sorted(rises)
    ((50,), dtype('float32'), ['baseline_loss', 'delta_losses', 'epsilon'])
    """
    if loss_fn is None:
        raise ValueError(
            "`loss_fn` is missing: pass `loss_fn(model, probe)`, the loss that the model is trained on. Nothing else says "
            "which labels and which loss belong to `probe`."
        )

    def as_tensor(model: nn.Module, probe: Any) -> Any:
        """In float64 where it is a number; what is neither a number nor a tensor is refused in `loss_of`."""
        out = loss_fn(model, probe)
        number = (isinstance(out, Real) and not isinstance(out, bool)) or (
            isinstance(out, np.ndarray) and out.ndim == 0
        )
        return torch.tensor(float(out), dtype=torch.float64) if number else out

    loss = loss_of(model, probe, as_tensor)
    options: dict[str, Any] = {"n_directions": n_directions, "epsilon": epsilon, "two_sided": False}
    # one at a time: a number can be taken out of a loop, not out of a `vmap`
    result = flatness(loss, loss.net.theta, key=key_of(seed), chunk=1, **options)
    warn_where_level(result.delta_losses)
    values = {"baseline_loss": result.baseline_loss, "delta_losses": result.delta_losses.numpy(), "epsilon": epsilon}
    return {name: np.asarray(value, np.float32) for name, value in values.items()}
