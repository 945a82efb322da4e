"""What is kept of a corpus that passes by batch by batch: moments of a site, and a uniform sample of its positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .checks import check_count
from .estimate import wide
from .forward import Inputs
from .keys import Key, check_key, fold_in, uniform
from .layout import Params
from .model import Functional
from .reading import Batch, Reading
from .sites import check_sites
from .trace import sites_of, trace

R = TypeVar("R")
Rows = Float[Tensor, "n d"]


class Reservoir(NamedTuple):
    """A uniform sample of the rows that were seen, without replacement; made by `reservoir`."""

    key: Key
    size: int
    """Rows that are kept at most."""
    rows: dict[str, Rows]
    """By name: of several sites, the values at the same positions."""
    sequence: Int[Tensor, " n"]
    """Where each row is from: its sequence, counted from 0 over all batches,"""
    position: Int[Tensor, " n"]
    """and its place among the tokens of that, padding not counted."""
    priority: Float[Tensor, " n"]
    num: int
    """Rows that were seen."""

    def update(self, rows: Mapping[str, Tensor], sequence: Int[Tensor, " n"], position: Int[Tensor, " n"]) -> Reservoir:
        """With more rows. Raises ValueError where names or lengths do not fit those of before."""
        if self.rows and self.rows.keys() != rows.keys():
            raise ValueError(f"`rows` must be of {', '.join(self.rows)}, got {', '.join(rows)}.")
        if bad := [name for name, each in rows.items() if len(each) != len(sequence)]:
            raise ValueError(f"`rows` of {bad[0]} are {len(rows[bad[0]])}, and `sequence` names {len(sequence)}.")
        priority = _priorities(self.key, sequence, position)
        few = priority.sort(stable=True).indices[: self.size]
        part = Reservoir(
            self.key, self.size, {name: each[few.to(each.device)] for name, each in rows.items()},
            sequence.cpu()[few], position.cpu()[few], priority[few], len(priority),
        )  # fmt: skip
        return self.merge(part)

    def merge(self, other: Reservoir) -> Reservoir:
        """Of the rows that either has seen, which must be different ones: in the order of their priority."""
        if (self.key, self.size) != (other.key, other.size):
            raise ValueError(
                "reservoirs of different keys or sizes are no samples of one corpus: make both from one call."
            )
        if not self.num or not other.num:
            return self if self.num else other
        priority = torch.cat([self.priority, other.priority])
        few = priority.sort(stable=True).indices[: self.size]
        sequence, position = (
            torch.cat(each)[few]
            for each in ((self.sequence, other.sequence), (self.position, other.position))
        )  # fmt: skip
        rows = {name: torch.cat([each, other.rows[name]])[few.to(each.device)] for name, each in self.rows.items()}
        return Reservoir(self.key, self.size, rows, sequence, position, priority[few], self.num + other.num)


def reservoir(key: Key, size: int) -> Reservoir:
    """An empty sample of at most `size` rows: of every set of so many rows, each is as likely to stay.

    Every row has a random priority, of 48 bits, which follows from the key, its sequence and its position alone, and the rows
    with the smallest ones stay: the same whatever the batches are, in which order they come, and how parts are merged.

    Vitter (1985), doi:10.1145/3147.3165, section 2 (a random sort).

    >>> from funcscope.core.keys import key
    >>> x, at = torch.arange(9.0)[:, None], torch.arange(9)
    >>> whole = reservoir(key(0), 3).update({"x": x}, at * 0, at)
    >>> half = reservoir(key(0), 3).update({"x": x[5:]}, at[5:] * 0, at[5:]).update({"x": x[:5]}, at[:5] * 0, at[:5])
    >>> whole.rows["x"].equal(half.rows["x"]), whole.num
    (True, 9)
    """
    check_key(key)
    check_count("size", size)
    none = torch.zeros(0, dtype=torch.long)
    return Reservoir(key, size, {}, none, none, torch.zeros(0, dtype=torch.float64), 0)


class Moments(NamedTuple):
    r"""Mean and scatter of rows, $S = \sum_i (x_i - \mu)(x_i - \mu)^\top$, in float64, merged without cancellation.

    The rows are tokens, which are not independent: the error of the mean is over the sequences that they are of.

    Chan, Golub, LeVeque (1983), doi:10.1080/00031305.1983.10483115.
    """

    num: int
    """Rows."""
    num_sequences: int
    """With a row."""
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d *d"]
    """A matrix, or its diagonal."""
    squares: Float[Tensor, "3 d"]
    """Over sequences, sums of $(a - c n)^2$, $(a - c n)\\, n$ and $n^2$: a is a sequence's sum, n its rows, c the origin."""
    origin: Float[Tensor, " d"]

    @property
    def second_moment(self) -> Float[Tensor, "d *d"]:
        r"""$\tfrac1n \sum_i x_i x_i^\top$, not centred; its diagonal where only that is known."""
        square = torch.outer(self.mean, self.mean) if self.scatter.ndim == 2 else self.mean.square()
        return self.scatter / self.num + square

    @property
    def covariance(self) -> Float[Tensor, "d *d"]:
        """Centred, by n - 1."""
        return self.scatter / (self.num - 1) if self.num > 1 else torch.full_like(self.scatter, math.nan)

    @property
    def mean_stderr(self) -> Float[Tensor, " d"]:
        """Of the mean, over sequences: `standard_errors.ratio_stderr`; nan below two."""
        if self.num_sequences < 2:
            return torch.full_like(self.mean, math.nan)
        (aa, an, nn), shift = self.squares, self.mean - self.origin
        beside = (aa - 2 * shift * an + shift.square() * nn).clamp_min(0)
        return (self.num_sequences / (self.num_sequences - 1) * beside).sqrt() / self.num


def streams_of(net: Functional) -> tuple[str, ...]:
    """The residual stream before the first block and behind each. Raises ValueError for models that are not described."""
    behind = [name for name in sites_of(net) if name.startswith("resid_post.")]
    if not behind:
        raise ValueError(
            f"the layers of {type(net._skeleton).__name__} are not described, nor is a residual stream: give arrays of "
            "your own to the functions that take these."
        )
    return ("resid_pre.0", *behind)


def sampled(
    sites: Sequence[str], result: Callable[[Reservoir], R], *, key: Key, size: int, scored: bool = False
) -> Reading[R]:
    """A reading that keeps a uniform sample of positions of some sites, and makes its result of that.

    A module's output of one vector per input (`module:NAME`, of a network that is no transformer) has one position. scored:
    of positions that the loss scores, with their targets among the rows (`target`); else of all tokens.
    """
    check_key(key)
    check_count("size", size)

    def of_batch(batch: Batch) -> Reservoir:
        chosen = {name: value for name, value in batch.seen.values.items() if is_at(name, sites)}
        single = all(value.ndim == 2 and name.startswith("module:") for name, value in chosen.items())
        rows = {name: value[:, None] for name, value in chosen.items()} if single else chosen
        mask = _positions(batch, next(iter(rows.values())), single)
        for name, value in rows.items():
            _check_site(name, value, mask)
        place = mask.cumsum(1) - 1
        if scored:
            mask = mask & (batch.targets.weight != 0)
            rows["target"] = batch.targets.index
        sequence = mask.nonzero()[:, 0] + batch.start
        return reservoir(key, size).update({name: x[mask] for name, x in rows.items()}, sequence, place[mask])

    return Reading(tuple(sites), of_batch, result, lambda before, part: part if before is None else before.merge(part))


def _positions(batch: Batch, value: Tensor, single: bool) -> Bool[Tensor, "b t"]:
    """Which positions hold a token. Of a network whose outputs do not say how many there are, and no mask: all."""
    mask, inputs = batch.seen.mask, batch.inputs
    is_masked = isinstance(inputs, Mapping) and inputs.get("attention_mask") is not None
    if single or (not batch.seen.num_layers and not is_masked):
        return torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
    return mask


def summed(sites: Sequence[str], result: Callable[[dict[str, Moments]], R], *, diagonal: bool = False) -> Reading[R]:
    """A reading of the moments of some sites over all tokens, and what is made of them; see `streamed`."""

    def of_batch(batch: Batch) -> dict[str, Moments]:
        chosen = {name: value for name, value in batch.seen.values.items() if is_at(name, sites)}
        for name, value in chosen.items():
            _check_site(name, value, batch.seen.mask)
        return {name: _of_batch(value, batch.seen.mask, diagonal) for name, value in chosen.items()}

    def merge(before: dict[str, Moments] | None, part: dict[str, Moments]) -> dict[str, Moments]:
        return part if before is None else {name: _merged(before[name], each) for name, each in part.items()}

    return Reading(tuple(sites), of_batch, result, merge)


def is_at(name: str, sites: Sequence[str]) -> bool:
    """Whether a site is one of these, or of their kinds."""
    return name in sites or (name.partition(".")[0] in sites and not name.startswith("module:"))


class Streamed(NamedTuple):
    """What is known of a corpus after it has passed."""

    moments: dict[str, Moments]
    """By site."""
    sample: Reservoir | None


@torch.no_grad()
def streamed(
    net: Functional, params: Params, batches: Iterable[Inputs], sites: Iterable[str], *, key: Key | None = None,
    size: int | None = None, diagonal: bool = False,
) -> Streamed:  # fmt: skip
    """Moments of sites over all tokens of a corpus and, with `key` and `size`, a uniform sample of its positions.

    batches: inputs, a generator say. sites: those that are per batch, position and unit (`resid_post`, `mlp_post.3`, ...).
    diagonal: second moments of single units only, D numbers in place of D x D. One forward pass for every batch, of which
    nothing else is kept; padding does not count.

    Raises ValueError for another kind of site, for one of `key` and `size` alone, and where there is no token.

    >>> import funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> batches = ({"input_ids": torch.full((2, 3), i)} for i in range(5))
    >>> seen = streamed(net, net.params, batches, ["resid_post"], key=fs.key(0), size=7)
    >>> seen.moments["resid_post.0"].num, seen.sample.rows["resid_post.0"].shape
    (30, torch.Size([7, 4]))
    """
    if (key is None) != (size is None):
        raise ValueError("`key` and `size` go together: both for a sample, neither for moments alone.")
    check_sites(sites)
    if isinstance(batches, (Mapping, Tensor)):
        batches = [batches]
    sites, start = list(sites), 0
    readings: list[Reading[Any]] = [summed(sites, lambda moments: moments, diagonal=diagonal)]
    if key is not None and size is not None:
        readings.append(sampled(sites, lambda sample: sample, key=key, size=size))
    kept: list[Any] = [None] * len(readings)
    for inputs in batches:
        batch = Batch(trace(net, params, inputs, sites), inputs, None, start)
        kept = [each.merge(before, each.of_batch(batch)) for each, before in zip(readings, kept, strict=True)]
        start += len(batch.seen.mask)
        del batch  # before the next one is made
    if not kept[0] or any(each.num == 0 for each in kept[0].values()):
        raise ValueError("`batches` hold no token: there is nothing to be known of them.")
    return Streamed(kept[0], kept[1] if len(kept) > 1 else None)


def _merged(a: Moments, b: Moments) -> Moments:
    """Of the rows of both."""
    if not a.num or not b.num:
        return a if a.num else b
    (aa, an, nn), step = b.squares, b.origin - a.origin
    b = b._replace(squares=torch.stack([aa + 2 * step * an + step.square() * nn, an + step * nn, nn]))
    num, apart = a.num + b.num, b.mean - a.mean
    between = torch.outer(apart, apart) if a.scatter.ndim == 2 else apart.square()
    return Moments(
        num, a.num_sequences + b.num_sequences, a.mean + apart * (b.num / num),
        a.scatter + b.scatter + between * (a.num * b.num / num), a.squares + b.squares, a.origin,
    )  # fmt: skip


def _of_batch(value: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"], diagonal: bool) -> Moments:
    rows = value[mask].to(wide(value.device))
    counts = mask.sum(1)
    first = rows[0] if len(rows) else rows.new_zeros(rows.shape[1])
    mean = first + (rows - first).sum(0) / max(len(rows), 1)  # of equal rows exactly these: nothing is left to scatter
    centred = rows - mean
    beside = torch.where(mask[..., None], value.to(rows.dtype) - mean, 0.0).sum(1)
    num = counts[:, None].to(rows.dtype)
    squares = torch.stack([beside.square().sum(0), (beside * num).sum(0), num.square().sum(0).expand_as(mean)])
    scatter = centred.square().sum(0) if diagonal else centred.T @ centred
    return Moments(len(rows), int((counts > 0).sum()), mean, scatter, squares, mean)


def _priorities(key: Key, sequence: Int[Tensor, " n"], position: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Numbers in [0, 1) of 48 bits: entries of a draw of each sequence, which begins alike whatever its length."""
    made = torch.empty(len(sequence), dtype=torch.float64)
    sequence, position = sequence.cpu(), position.cpu()
    for each in sequence.unique().tolist():
        there = sequence == each
        places = position[there]
        pair = uniform(fold_in(key, each), torch.empty(int(places.max()) + 1, 2, dtype=torch.float64))[places]
        made[there] = pair[:, 0] + pair[:, 1] * 2.0**-24
    return made


def _check_site(name: str, value: Tensor, mask: Bool[Tensor, "b t"]) -> None:
    if value.ndim != 3 or value.shape[:2] != mask.shape:
        raise ValueError(
            f"`{name}` has the shape {tuple(value.shape)}, and streams are of sites per batch, position and unit: "
            "the residual stream, what attention and MLPs read and write."
        )
