"""What the loss needs: its change where heads, MLPs, neurons or the residual stream lose what they say of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_choice
from ..core.estimate import wide
from ..core.forward import Inputs
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.layout import Params
from ..core.objective import Loss, Theta, check_point
from ..core.result import internal, quantity
from ..core.standard_errors import ratio_stderr
from ..core.trace import Trace, apply_with, trace
from .effects import PLACES, _SiteEffects, edits_where, effect_per, every_place, one_by_one, site_names
from .passes import not_finite

Mode = Literal["zero", "mean", "resample"]


class AblationEffects(_SiteEffects):
    """Changes of the loss by ablation; made by `ablation_effects`."""

    mode: str
    loss: float = quantity("loss", unit="loss")
    key: Key | None
    donors: Float[Tensor, " n"] | None = internal()
    """Whose values each sequence is given, where they are another's."""
    units: list[str] = internal()

    of_heads = effect_per("loss change", "layer", "head", unit="loss")
    of_layers = effect_per("loss change", "layer", unit="loss")
    of_units = effect_per("loss change", "neuron", unit="loss")

    @property
    def effects_stderr(self) -> Tensor:
        """Over sequences, paired; with the covariance of a sequence and the one that it gives values to, where that adds."""
        alone = ratio_stderr(self.changes, self.reference)
        if self.donors is None:
            return self.shaped(alone)
        beside = self.changes - self.means[:, None] * self.reference
        with_donor = (beside * beside[:, self.donors.long()]).sum(1) / beside.square().sum(1).clamp(min=1e-300)
        return self.shaped(alone * (1 + 2 * with_donor.clamp(min=0)).sqrt())

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        return {"neuron": self.units} if self.units else super().coords

    @property
    def notes(self) -> list[str]:
        return not_finite("the loss is", self.loss)

    @property
    def head(self) -> str:
        how = {"zero": "0", "mean": "their mean over the data", "resample": "those of other sequences"}[self.mode]
        return f"change of the loss ({self.loss:.5g}) with {self.sites} replaced by {how}, {self.changes.shape[1]} sequences"


def ablation_effects(
    loss: Loss,
    params: Theta,
    *,
    sites: Literal["heads", "attention", "mlps", "residual", "neurons"] = "heads",
    mode: Mode = "mean",
    units: Sequence[tuple[int, int]] = (),
    key: Key | None = None,
    chunk: int = 8,
) -> AblationEffects:
    r"""How much the loss rises when one part after another no longer says what it says of a sequence.

    $$\Delta_s = L(\text{site } s \text{ replaced}) - L, \qquad
      \mathrm{SE}^2 = \tfrac{n}{n-1} \textstyle\sum_i (d_{si} - \Delta_s w_i)^2 / W^2,$$

    in the unit of the loss: a mean over scored tokens, d its paired differences per sequence. Above 0 the model needs the
    part; 0 where the part does nothing. (1 / (1 + |change|), as a document has it, is largest where ablation does nothing.)

    sites: "heads" (`z`, the head's output before the output matrix: layer by head), "attention", "mlps" (what a layer's
    attention or MLP writes), "residual" (`resid_post`: by layer), or "neurons" (`mlp_post` of `units`, a list of (layer,
    unit)). mode: 0; the mean over all positions of the data that hold a token; or "resample": the values at the same place
    of another sequence of the batch, one after another in a random circle under `key` (the k-th token has those of its k-th
    token, a shorter one being repeated). Replacing the residual stream by a constant leaves nothing of the text behind it.

    Streamed: a trace of one batch, and `chunk` passes side by side, are in memory. Under "resample" the numbers depend on
    which sequences share a batch; sequences are then dependent in pairs, and errors hold that where it makes them larger.

    Raises ValueError for unknown sites, units that are not there, a missing key, and, to resample, a batch of one sequence.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8))
    >>> loss = fs.objective(fs.functional(model), {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}, fs.causal_lm)
    >>> ablation_effects(loss, loss.net.params).effects.shape
    torch.Size([2, 2])
    """
    check_point(loss, params, "params")
    check_choice("mode", mode, ("zero", "mean", "resample"))
    if mode == "resample":
        check_key(key)
    names = site_names(loss.net, sites, tuple(PLACES))
    values = loss.params(params)
    with torch.no_grad():
        size = trace(loss.net, values, loss.batches[0][0], names[:1])[names[0]]
        chosen, axes = _selections(sites, units, len(names), size)
        means = _means(loss, values, names) if mode == "mean" else [size.new_zeros(()) for _ in names]
    changes, weights, sums = [], [], []
    donors: list[Tensor] = []
    for index, (inputs, targets) in enumerate(loss.batches):
        replaced = means
        if mode == "resample":
            with torch.no_grad():
                seen = trace(loss.net, values, inputs, names)
            replaced, giver = _of_others(seen, names, fold_in(key, index), index)  # type: ignore[arg-type]
            donors.append(giver + sum(map(len, donors)))
        score = _scorer(loss, values, names, sites, (inputs, targets), replaced)
        with torch.no_grad():
            before, weight = loss.scored(lambda each: apply_with(loss.net, values, each, {})[0], inputs, targets)
        changes.append(one_by_one(score, chosen, chunk) - before)
        sums.append(before)
        weights.append(weight)
    whole = torch.cat(weights).cpu()
    shape = list(chosen.shape[1:]) if axes == ["layer", "head"] else [len(chosen)]
    return AblationEffects(
        torch.cat(changes, 1).cpu(), whole, axes, shape, sites, mode, float(torch.cat(sums).sum() / whole.sum()), key,
        torch.cat(donors).double().cpu() if donors else None, [f"{layer}.{unit}" for layer, unit in units],
    )  # fmt: skip


def _scorer(
    loss: Loss, values: Params, names: Sequence[str], sites: str, batch: tuple[Inputs, Any], new: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """From a selection of places to the sums of a batch's sequences."""

    def sums(chosen: Tensor) -> Float[Tensor, " n"]:
        edits = edits_where(names, PLACES[sites][1], chosen, new)
        return loss.scored(lambda inputs: apply_with(loss.net, values, inputs, edits)[0], *batch)[0]

    return sums


def _selections(
    sites: str, units: Sequence[tuple[int, int]], num_layers: int, value: Tensor
) -> tuple[Bool[Tensor, "s l p"], list[str]]:
    """The places that are ablated one after another, and what they are per. value: of one site, for its sizes."""
    if bool(units) != (sites == "neurons"):
        raise ValueError(
            f"`units` must be a list of (layer, unit) for `sites='neurons'`, and only there, got {units!r}."
        )
    if sites == "heads":
        return every_place(num_layers, value.shape[2], value.device), ["layer", "head"]
    if sites != "neurons":
        return every_place(num_layers, 1, value.device), ["layer"]
    num_units = value.shape[-1]
    chosen = torch.zeros(len(units), num_layers, num_units, dtype=torch.bool, device=value.device)
    for row, (layer, unit) in enumerate(units):
        if not (0 <= layer < num_layers and 0 <= unit < num_units):
            raise ValueError(
                f"`units` must be of {num_layers} layers with {num_units} units each, got {(layer, unit)}."
            )
        chosen[row, layer, unit] = True
    return chosen, ["neuron"]


def _means(loss: Loss, values: Params, names: Sequence[str]) -> list[Tensor]:
    """Of every site, the mean over the positions that hold a token."""
    totals, num = [torch.zeros((), dtype=wide(loss.net.device))] * len(names), 0
    for inputs, _ in loss.batches:
        seen = trace(loss.net, values, inputs, names)
        totals = [
            total + seen[name][seen.mask].sum(0, dtype=total.dtype) for total, name in zip(totals, names, strict=True)
        ]
        num += int(seen.mask.sum())
    return [total / num for total in totals]


def _of_others(seen: Trace, names: Sequence[str], key: Key, index: int) -> tuple[list[Tensor], Tensor]:
    """Of every site, the values of another sequence at the same place, and whose they are."""
    mask, num = seen.mask, len(seen.mask)
    if num < 2:
        raise ValueError(f"batch {index} has one sequence and no other to resample from: give larger batches.")
    circle = uniform(key, torch.zeros(num, dtype=torch.float64)).argsort().to(mask.device)
    giver = torch.empty_like(circle).scatter(0, circle, circle.roll(-1))
    places = mask.long().argsort(dim=1, descending=True, stable=True)
    rank = (mask.cumsum(1) - 1).clamp(min=0) % mask.sum(1)[giver].clamp(min=1)[:, None]
    at = places[giver].gather(1, rank)
    return [seen[name][giver[:, None], at] for name in names], giver
