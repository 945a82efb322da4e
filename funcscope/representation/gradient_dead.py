"""Units of MLPs that no gradient comes to: behind the nonlinearity, and before it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

from ..core.layout import Params
from ..core.objective import Loss
from ..core.result import Result, internal, quantity
from ..core.tables import counted
from ..core.trace import apply_with, trace
from .sequence_sums import Reached
from .units import mlp_sites


class GradientDead(Result):
    """Which units of each layer the loss does not depend on, and which do not learn."""

    unread: Float[Tensor, " l"] = quantity(
        "share of units without gradient behind the nonlinearity", per="layer", stderr="unread_stderr"
    )
    unread_stderr: Float[Tensor, " l"]
    untaught: Float[Tensor, " l"] = quantity(
        "share of units without gradient before the nonlinearity", per="layer", stderr="untaught_stderr"
    )
    untaught_stderr: Float[Tensor, " l"]
    largest_post: Float[Tensor, "l d"] = quantity(
        "largest derivative by the activation", unit="loss", per=("layer", "unit"), shown=False
    )
    largest_pre: Float[Tensor, "l d"] = quantity(
        "largest derivative by what goes into it", unit="loss", per=("layer", "unit"), shown=False
    )
    num_sequences: int = internal()

    @property
    def coords(self) -> dict[str, range]:
        return {"layer": range(len(self.unread))}

    @property
    def head(self) -> str:
        return f"units that no gradient comes to, over {counted(self.num_sequences, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        made = ["There is one sequence, and no error over sequences."] if self.num_sequences < 2 else []
        if not bool(self.largest_post.isfinite().all()):
            made.append("Derivatives are not finite, and what is made of them undefined: check the weights.")
        return made


def gradient_dead(loss: Loss, params: Params) -> GradientDead:
    r"""Units of the MLPs that no gradient comes to: the derivative of the loss by them is exactly 0 at every token.

    $$\max_t |\partial L / \partial a_{tj}| = 0.$$

    Behind the nonlinearity (the site `mlp_post`) this says that nothing reads the unit: it does *not* follow from a unit that
    never fires, whose output would matter if there were one. Before it (`mlp_pre`; of a gated MLP, the gate) it says that the
    weights into the unit get no gradient: for ReLU, a unit that never fires, or one that is not read. L is the sum of the
    weighted losses of a sequence, not their mean; positions without a token do not count.

    Derivatives by zeros that are added at the sites, one backward pass for every batch. In bfloat16 or float16 a small
    derivative may round to 0. Errors over sequences by the jackknife.

    Raises ValueError for a model whose parts are not described.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> gradient_dead(fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm), net.params).unread
    tensor([0., 0.], dtype=torch.float64)
    """
    net, kinds = loss.net, ("mlp_post", "mlp_pre")
    names = [name for kind in kinds for name in mlp_sites(net, kind)]
    reached: dict[str, Reached] = {}
    largest: dict[str, Tensor] = {}
    for inputs, targets in loss.batches:
        with torch.no_grad():
            seen = trace(net, params, inputs, names)
        zeros = [torch.zeros_like(seen[name]) for name in names]

        def total(*shifts: Tensor, inputs=inputs, targets=targets) -> Tensor:  # type: ignore[no-untyped-def]
            edits = {name: lambda x, d=d: x + d for name, d in zip(names, shifts, strict=True)}
            return loss.scored(lambda each: apply_with(net, params, each, edits)[0], inputs, targets)[0].sum()

        value, pull = vjp(total, *zeros)
        mask = seen.mask[..., None]
        for name, slope in zip(names, pull(torch.ones_like(value)), strict=True):
            size = torch.where(mask, slope.abs(), 0.0).amax(1)[seen.mask.any(1)]  # of sequences, units
            part, most = Reached.of(size != 0), size.amax(0).cpu().double()
            reached[name] = reached[name].merge(part) if name in reached else part
            largest[name] = torch.maximum(largest[name], most) if name in largest else most
    post, pre = ([name for name in names if name.startswith(f"{kind}.")] for kind in kinds)
    shares = [[reached[name].never for name in each] for each in (post, pre)]
    values, errors = ([torch.stack([x[i] for x in each]) for each in shares] for i in (0, 1))
    sizes = [torch.stack([largest[name] for name in each]) for each in (post, pre)]
    num, known = reached[post[0]].num, [each.isfinite().all(1) for each in sizes]
    values, errors = (
        [x.where(there, math.nan) for x, there in zip(each, known, strict=True)] for each in (values, errors)
    )
    return GradientDead(values[0], errors[0], values[1], errors[1], sizes[0], sizes[1], num_sequences=num)
