"""What single units of MLPs do over a corpus: how often they fire, how strongly, and which never do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.checks import check_choice, check_number, check_positive
from ..core.estimate import wide
from ..core.forward import Inputs
from ..core.layout import Params
from ..core.model import Functional
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from ..core.trace import sites_of, trace
from .sequence_sums import Ratios, Reached, batches_of

Rule = Literal["positive", "relative"]
Values = Float[Tensor, "b t d"]
Mask = Bool[Tensor, "b t"]
SITE = "mlp_post"


class UnitSums(NamedTuple):
    """Of the units of one layer, over tokens and sequences; made by `unit_sums`, and additive."""

    num: int
    """Tokens."""
    of_layer: Ratios
    """Over all units: the share of active ones, the mean square, the share at a flat end."""
    of_units: Ratios
    """The same three and the mean, (4, d)."""
    fired: Reached
    """By an activation above the threshold,"""
    paused: Reached
    """and by one that is not."""
    threshold: float

    def merge(self, other: UnitSums) -> UnitSums:
        """Of the sequences of both. Raises ValueError where their thresholds differ."""
        if self.threshold != other.threshold:
            raise ValueError(
                f"sums of different thresholds ({self.threshold:g}, {other.threshold:g}) count different things: make "
                "both with one."
            )
        return UnitSums(
            self.num + other.num, self.of_layer.merge(other.of_layer), self.of_units.merge(other.of_units),
            self.fired.merge(other.fired), self.paused.merge(other.paused), self.threshold,
        )  # fmt: skip


class UnitActivity(Result):
    """How often and how strongly the units of each layer are active, and which never are."""

    num_units: Int[Tensor, " l"] = quantity("units", per="layer")
    frequency: Float[Tensor, " l"] = quantity("share of active units", per="layer", stderr="frequency_stderr")
    """Mean over units and tokens."""
    frequency_stderr: Float[Tensor, " l"]
    rms: Float[Tensor, " l"] = quantity("root mean square of activations", per="layer", stderr="rms_stderr")
    rms_stderr: Float[Tensor, " l"]
    num_dead: Int[Tensor, " l"] = quantity("units that are never active", per="layer")
    dead: Float[Tensor, " l"] = quantity("share of units that are never active", per="layer", stderr="dead_stderr")
    dead_stderr: Float[Tensor, " l"]
    """By leaving out one sequence after another."""
    once: Float[Tensor, " l"] = quantity("share of units that are active in one sequence only", per="layer")
    always: Float[Tensor, " l"] = quantity("share of units that are always active", per="layer", stderr="always_stderr")
    always_stderr: Float[Tensor, " l"]
    flat: Float[Tensor, " l"] | None = quantity("share of activations at a flat end", per="layer", stderr="flat_stderr")
    flat_stderr: Float[Tensor, " l"] | None
    unit_frequency: Float[Tensor, "l d"] = quantity(
        "share of tokens on which it is active", per=("layer", "unit"), stderr="unit_frequency_stderr", shown=False
    )
    unit_frequency_stderr: Float[Tensor, "l d"]
    unit_mean: Float[Tensor, "l d"] = quantity("mean activation", per=("layer", "unit"), shown=False)
    unit_rms: Float[Tensor, "l d"] = quantity("root mean square", per=("layer", "unit"), shown=False)
    unit_flat: Float[Tensor, "l d"] | None = quantity(
        "share of tokens at a flat end", per=("layer", "unit"), shown=False
    )
    threshold: Float[Tensor, " l"] = quantity("threshold of activity", per="layer")
    rule: str
    tau: float
    num_tokens: int
    num_sequences: int
    layers: list[str] = internal()

    @derived("largest frequency of a unit that was never active, tokens independent")
    def bound_tokens(self) -> float:
        """At 95 %: 3 / tokens."""
        return min(1.0, 3 / self.num_tokens)

    @derived("largest frequency of a unit that was never active, sequences independent")
    def bound_sequences(self) -> float:
        """At 95 %: 3 / sequences, whatever the tokens of one have in common."""
        return min(1.0, 3 / self.num_sequences)

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"layer": self.layers}

    @property
    def head(self) -> str:
        what = "a > 0" if self.rule == "positive" else f"|a| > {self.tau:g} rms of the layer"
        over = f"{counted(self.num_tokens, 'token')} of {counted(self.num_sequences, 'sequence')}"
        return f"activity of units ({what}) over {over}"

    @property
    def notes(self) -> list[str]:
        made = [
            "A unit that was never active may be a rare one: the bound holds its frequency, by tokens if these were "
            "independent, by sequences in any case."
        ]
        if self.num_sequences < 2:
            made.append("There is one sequence, and no error over sequences.")
        if not bool(self.rms.isfinite().all()):
            made.append("Activations of a layer are not finite, and what is made of them undefined: check the weights.")
        return made


def unit_sums(
    values: Values, mask: Mask, *, rule: Rule = "positive", threshold: float = 0.0,
    bounds: tuple[float, float] | None = None, flat: float = 0.01,
) -> UnitSums:  # fmt: skip
    r"""The sums of a batch: a unit is active at a token where $a > \theta$ ("positive") or $|a| > \theta$ ("relative").

    values: activations behind the nonlinearity. threshold: one number for all batches (`unit_activity` takes $\tau$ times the
    root mean square of the layer), so that sums of batches add up to those of the whole. bounds: the flat ends of a
    nonlinearity that has two (-1 and 1 of tanh); at one is what lies within `flat` of their distance. Positions outside the
    mask count nowhere.

    Raises ValueError for another shape of the mask, for a negative threshold, and for bounds in the wrong order.

    >>> import torch
    >>> a = torch.tensor([[[0.0, 2.0], [0.0, 1.0]], [[3.0, 1.0], [0.0, 1.0]]])
    >>> sums = unit_sums(a, torch.tensor([[True, True], [False, True]]))
    >>> sums.num, sums.of_units.value[0]
    (3, tensor([0., 1.], dtype=torch.float64))
    """
    check_choice("rule", rule, ("positive", "relative"))
    check_number("threshold", threshold, 0.0)
    check_number("flat", flat, 0.0, 0.5)
    if mask.shape != values.shape[:2]:
        raise ValueError(f"`mask` must have the shape {tuple(values.shape[:2])} of `values`, got {tuple(mask.shape)}.")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"`bounds` must be the lower and the upper end of a nonlinearity, got {bounds}.")
    there = mask.any(1)
    a, inside = values[there].to(wide(values.device)), mask[there][..., None]
    above = (a > threshold if rule == "positive" else a.abs() > threshold) & inside
    near = torch.zeros_like(above)
    if bounds is not None:
        low, high = bounds
        near = ((a < low + flat * (high - low)) | (a > high - flat * (high - low))) & inside
    a = torch.where(inside, a, 0.0)
    each = torch.stack([x.to(a).sum(1) for x in (above, a.square(), near, a)])  # number, sequence, unit
    counts = inside.sum((1, 2)).to(a)
    return UnitSums(
        int(counts.sum()), Ratios.of(each[:3].mean(-1), counts), Ratios.of(each.movedim(1, -1), counts),
        Reached.of(above.any(1)), Reached.of((inside & ~above).any(1)), float(threshold),
    )  # fmt: skip


def unit_activity(
    net: Functional, params: Params, batches: Inputs | Iterable[Inputs], *, rule: Rule = "positive", tau: float = 1e-2,
    bounds: tuple[float, float] | None = None, flat: float = 0.01,
) -> UnitActivity:  # fmt: skip
    r"""How often each unit of every MLP is active, and which units are dead: never active on these tokens.

    $$f_j = \tfrac1N \textstyle\sum_t [a_{tj} > 0] \ \text{("positive")}, \qquad
      f_j = \tfrac1N \textstyle\sum_t [|a_{tj}| > \tau \cdot \mathrm{rms}] \ \text{("relative")},$$

    with a the activation *behind* the nonlinearity (the site `mlp_post`): a ReLU unit that never fires has large negative
    values before it, and by these would count as alive. "positive" is for ReLU; GELU, SiLU and gated MLPs are hardly ever 0,
    and take "relative", with the layer's root mean square over all of these tokens (in a pass of its own, so that the batches
    decide nothing). The activation of a gated MLP is the product of the gate behind its nonlinearity and the other branch.

    A unit that is never active in N independent tokens has a frequency below 3 / N with 95 % (`bound_tokens`). Tokens of a
    sequence are not independent: the share of sequences in which it is active is below 3 / sequences, and so is its
    frequency where sequences are of like length (`bound_sequences`). Errors are over sequences; those of shares of units by
    the jackknife, for these units. More sequences can only lower the share of dead units.

    bounds, flat: as for `unit_sums`. batches: inputs, of one batch or of each; they are kept.

    Raises ValueError for models whose parts are not described, and where there is no token.

    Lu et al. (2019), arXiv:1903.06733 (dying ReLU); Hanley, Lippman-Hand (1983), doi:10.1001/jama.1983.03330370053031.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> found = unit_activity(net, net.params, [torch.tensor([[1, 2, 3], [4, 5, 6]])], rule="relative")
    >>> found.num_units, found.bound_tokens
    (tensor([16, 16]), 0.5)
    """
    check_choice("rule", rule, ("positive", "relative"))
    check_positive("tau", tau)
    batches = list(batches_of(batches))
    thresholds: dict[str, float] = {}
    if rule == "relative":
        first = _streamed(net, params, batches, "positive", {})
        thresholds = relative_thresholds(first, tau)
    sums = _streamed(net, params, batches, rule, thresholds, bounds, flat)
    return activity_of(sums, rule=rule, tau=tau, flat=bounds is not None)


def relative_thresholds(sums: Mapping[str, UnitSums], tau: float) -> dict[str, float]:
    """tau times the root mean square of each layer. Raises ValueError where that is not finite."""
    thresholds = {name: tau * float(each.of_layer.value[1].sqrt()) for name, each in sums.items()}
    if bad := [name for name, each in thresholds.items() if not math.isfinite(each)]:
        raise ValueError(f"activations of `{bad[0]}` are not finite and have no root mean square: check the weights.")
    return thresholds


def activity_of(sums: Mapping[str, UnitSums], *, rule: Rule, tau: float = 1e-2, flat: bool = False) -> UnitActivity:
    """The result of the sums of every layer, by name. flat: whether they were made with bounds.

    Raises ValueError where there is no token.
    """
    layers = list(sums.values())
    if not layers or any(each.num == 0 for each in layers):
        raise ValueError("there is no token: nothing can be said of units.")
    values, errors = (torch.stack([getattr(x.of_layer, name).cpu() for x in layers]) for name in ("value", "stderr"))
    rms, never, always = values[:, 1].sqrt(), [x.fired.never for x in layers], [x.paused.never for x in layers]
    units = [_padded([x.of_units.value[i] for x in layers]) for i in range(4)]
    frequency_errors = _padded([x.of_units.stderr[0] for x in layers])
    known, unit_known = rms.isfinite(), units[1].isfinite()  # what is no number is not above any threshold

    def of_layer(each: Sequence[Tensor | float] | Tensor) -> Float[Tensor, " l"]:
        return torch.as_tensor(each, dtype=torch.float64).where(known, math.nan)

    return UnitActivity(
        num_units=torch.tensor([len(x.fired.hits) for x in layers]),
        frequency=of_layer(values[:, 0]), frequency_stderr=of_layer(errors[:, 0]),
        rms=rms, rms_stderr=torch.where(rms == 0, 0.0, errors[:, 1] / (2 * rms)),
        num_dead=torch.tensor(
            [int(((x.fired.hits == 0) & x.of_units.value[1].isfinite()).sum()) for x in layers]
        ),
        dead=of_layer([x.value for x in never]), dead_stderr=of_layer([x.stderr for x in never]),
        once=of_layer([x.fired.once for x in layers]),
        always=of_layer([x.value for x in always]), always_stderr=of_layer([x.stderr for x in always]),
        flat=of_layer(values[:, 2]) if flat else None, flat_stderr=of_layer(errors[:, 2]) if flat else None,
        unit_frequency=units[0].where(unit_known, math.nan),
        unit_frequency_stderr=frequency_errors.where(unit_known, math.nan), unit_mean=units[3], unit_rms=units[1].sqrt(),
        unit_flat=units[2].where(unit_known, math.nan) if flat else None,
        threshold=torch.tensor([x.threshold for x in layers], dtype=torch.float64), rule=rule, tau=tau,
        num_tokens=layers[0].num, num_sequences=layers[0].fired.num, layers=list(sums),
    )  # fmt: skip


@torch.no_grad()
def _streamed(
    net: Functional, params: Params, batches: Iterable[Inputs], rule: Rule, thresholds: Mapping[str, float],
    bounds: tuple[float, float] | None = None, flat: float = 0.01,
) -> dict[str, UnitSums]:  # fmt: skip
    made: dict[str, UnitSums] = {}
    names = mlp_sites(net)
    for inputs in batches:
        seen = trace(net, params, inputs, names)
        for name in names:
            threshold = thresholds.get(name, 0.0)
            part = unit_sums(seen[name], seen.mask, rule=rule, threshold=threshold, bounds=bounds, flat=flat)
            made[name] = made[name].merge(part) if name in made else part
    return made


def mlp_sites(net: Functional, kind: str = SITE) -> list[str]:
    """The sites of every layer's MLP units. Raises ValueError for a model whose parts are not described."""
    names = [name for name in sites_of(net) if name.startswith(f"{kind}.")]
    if not names:
        raise ValueError(
            f"the MLPs of {type(net._skeleton).__name__} are not described: trace a module's output and use `unit_sums`."
        )
    return names


def _padded(rows: list[Float[Tensor, " _"]]) -> Float[Tensor, "l d"]:
    """nan behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence([x.cpu() for x in rows], batch_first=True, padding_value=math.nan)
