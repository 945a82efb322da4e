"""Which parts carry a difference of two inputs: their values from one pass put into the other, exactly and to first order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice
from ..core.estimate import Estimate, wide
from ..core.forward import Inputs
from ..core.layout import Params
from ..core.model import Functional
from ..core.result import derived, quantity
from ..core.statistics import mean
from ..core.trace import Trace, apply_with, trace
from .effects import PLACES, _SiteEffects, edits_where, effect_per, every_place, one_by_one, site_names

Metric = Callable[[Tensor], Float[Tensor, " n"]]
"""From logits (sequence, position, vocabulary) to one number per sequence."""
Direction = Literal["denoise", "noise"]
SITES = ("heads", "attention", "mlps", "residual")
LEAST_ERRORS = 2.0
"""Standard errors that the difference of the inputs must be away from 0 for shares of it to mean something."""


class PatchingEffects(_SiteEffects):
    """Shares of the difference of two inputs by site; made by `activation_patching` and `attribution_patching`."""

    clean: Estimate = quantity("metric of the clean inputs")
    corrupt: Estimate = quantity("metric of the corrupt inputs")
    direction: str
    exact: bool

    of_heads = effect_per("share of the difference", "layer", "head")
    of_positions = effect_per("share of the difference", "layer", "position")

    @derived("difference of the metric, end minus start")
    def difference(self) -> Estimate:
        return mean(self.reference)

    @property
    def is_resolved(self) -> bool:
        """Whether the metric of the two inputs differs by more than twice the standard error of that."""
        return bool(self.difference.value.abs() > LEAST_ERRORS * self.difference.stderr)

    @property
    def unresolved(self) -> tuple[str, ...]:
        return () if self.is_resolved else ("effects",)

    @property
    def notes(self) -> tuple[str, ...]:
        if self.is_resolved:
            return ()
        return (
            f"the metric of clean and corrupt inputs differs by {self.difference}: shares of that are not resolved. "
            "`changes` are what they are; take more sequences, or inputs that the metric tells apart.",
        )

    @property
    def head(self) -> str:
        how = "exact" if self.exact else "to first order"
        into = "clean values in the corrupt pass" if self.direction == "denoise" else "corrupt values in the clean pass"
        return f"patching of {self.sites}, {into}, {how}, {self.changes.shape[1]} pairs of sequences"


def activation_patching(
    net: Functional,
    params: Params,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    *,
    sites: Literal["heads", "attention", "mlps", "residual"] = "heads",
    direction: Direction = "denoise",
    chunk: int = 8,
) -> PatchingEffects:
    r"""What share of the difference between two inputs each site alone carries, by one pass per site.

    $$e_s = \frac{\sum_i M_i(\text{start with site } s \text{ from end}) - M_i(\text{start})}
      {\sum_i M_i(\text{end}) - M_i(\text{start})},$$

    start the corrupt and end the clean pass ("denoise": is the site enough?), or the other way round ("noise": is it
    needed?). 0: the site carries nothing; 1: all; below 0 or above 1 it works against, or others do. Shares do not add up:
    sites lie behind each other. Standard errors are those of a ratio over sequences, paired. Where the metric of the two
    inputs does not differ by twice its standard error, shares are not resolved; nan where it does not differ at all.

    clean, corrupt: inputs of one shape, sequence by sequence the same text but for what is asked about, padded alike.
    metric: from logits to one number per sequence. sites: "heads" (`z`, at all positions: layer by head), or by layer and
    position what attention ("attention") or the MLP ("mlps") writes, or the residual stream behind the layer ("residual").
    chunk: sites side by side by `vmap`; the same numbers to rounding for all of them.

    Raises ValueError for inputs of two shapes or masks, unknown sites, and a metric that is not one number per sequence.

    Vig et al. (2020), arXiv:2004.12265; Meng et al. (2022), arXiv:2202.05262.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8))
    >>> net, clean, corrupt = fs.functional(model.double()), torch.tensor([[1, 2, 3]]), torch.tensor([[4, 2, 3]])
    >>> found = activation_patching(net, net.params, clean, corrupt, lambda logits: logits[:, -1, 5], sites="residual")
    >>> found.effects.shape, round(float(found.effects[1, 2]), 3)          # all that the last logit reads
    (torch.Size([2, 3]), 1.0)
    """
    task = patching_task(net, params, clean, corrupt, metric, direction)
    names = site_names(net, sites, SITES)
    with torch.no_grad():
        values = trace(net, params, task.end, names)
    first, axis = values[names[0]], PLACES[sites][1]
    num_places = first.shape[2 if axis == "head" else 1]

    def patched(chosen: Tensor) -> Float[Tensor, " n"]:
        edits = edits_where(names, axis, chosen, [values[name] for name in names])
        return scored(metric, apply_with(net, params, task.start, edits)[0])

    changes = one_by_one(patched, every_place(len(names), num_places, first.device), chunk) - task.start_score
    return _result(task, changes, sites, direction, True, values)


def attribution_patching(
    net: Functional,
    params: Params,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    *,
    sites: Literal["heads", "attention", "mlps", "residual"] = "heads",
    direction: Direction = "denoise",
) -> PatchingEffects:
    r"""`activation_patching` to first order: every site at once, by two forward passes and a backward one.

    $$\hat e_s = \frac{\sum_i (a^{\mathrm{end}}_{si} - a^{\mathrm{start}}_{si}) \cdot \nabla_{a_s} M_i(\text{start})}
      {\sum_i M_i(\text{end}) - M_i(\text{start})},$$

    the slope at the start: at the corrupt input for "denoise", at the clean one for "noise". The error is of second order in
    the difference of the site's values, and 0 for a model that is linear behind the site: proofs/attribution_patching.py.
    It is not small where attention saturates or LayerNorm is in between: check the largest by `activation_patching`.
    Standard errors are over sequences and do not hold that error.

    Arguments, shapes and errors as there. Nanda (2023); Kramar et al. (2024), arXiv:2403.00745.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8))
    >>> net, clean, corrupt = fs.functional(model.double()), torch.tensor([[1, 2, 3]]), torch.tensor([[4, 2, 3]])
    >>> attribution_patching(net, net.params, clean, corrupt, lambda logits: logits[:, -1, 5]).effects.shape
    torch.Size([2, 2])
    """
    task = patching_task(net, params, clean, corrupt, metric, direction)
    names = site_names(net, sites, SITES)
    with torch.no_grad():
        values = trace(net, params, task.end, names)

    def total(steps: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        edits = {name: (lambda x, step=step: x + step) for name, step in steps.items()}
        out, seen = apply_with(net, params, task.start, edits, names)
        return scored(metric, out).sum(), seen.values

    zeros = {name: torch.zeros_like(values[name]) for name in names}
    slopes, start = torch.func.grad(total, has_aux=True)(zeros)
    per_place = (1, 3) if PLACES[sites][1] == "head" else (2,)  # position and unit; unit
    parts = [
        ((values[name] - start[name]) * slopes[name]).sum(per_place, dtype=task.start_score.dtype).T for name in names
    ]
    return _result(task, torch.cat(parts).detach(), sites, direction, False, values)


class Task(NamedTuple):
    """Two inputs and what a metric makes of them."""

    start: Inputs
    end: Inputs
    start_score: Float[Tensor, " n"]
    end_score: Float[Tensor, " n"]


def patching_task(
    net: Functional, params: Params, clean: Inputs, corrupt: Inputs, metric: Metric, direction: str
) -> Task:
    """The pass that is patched and the one that values come from. Raises ValueError where they do not fit together."""
    check_choice("direction", direction, ("denoise", "noise"))
    start, end = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    with torch.no_grad():
        scores, masks = [], []
        for inputs in (start, end):
            out, seen = apply_with(net, params, inputs, {})
            scores.append(scored(metric, out))
            masks.append(seen.mask)
    if masks[0].shape != masks[1].shape or not torch.equal(*masks):
        raise ValueError(
            "`clean` and `corrupt` must be sequences of one shape with tokens at the same positions, got "
            f"{tuple(masks[0].shape)} and {tuple(masks[1].shape)}: pad them alike."
        )
    return Task(start, end, *scores)


def scored(metric: Metric, logits: Tensor) -> Float[Tensor, " n"]:
    """The metric of every sequence, wide. Raises ValueError where it is not one number for each."""
    value = metric(logits)
    if not isinstance(value, Tensor) or value.shape != logits.shape[:1]:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"`metric` must give one number for each of {len(logits)} sequences, from logits of shape "
            f"{tuple(logits.shape)}; got {got}: leave out the mean over sequences."
        )
    return value.to(wide(value.device))


def _result(task: Task, changes: Tensor, sites: str, direction: str, exact: bool, values: Trace) -> PatchingEffects:
    start, end = mean(task.start_score.cpu()), mean(task.end_score.cpu())
    clean, corrupt = (end, start) if direction == "denoise" else (start, end)
    axes = ["layer", PLACES[sites][1]]
    shape = [values.num_layers, len(changes) // values.num_layers]
    reference = (task.end_score - task.start_score).cpu()
    return PatchingEffects(changes.cpu(), reference, axes, shape, sites, clean, corrupt, direction, exact)
