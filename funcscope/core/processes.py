"""The processes that one computation is spread over: sums and exchanges over ranks that end, one way or the other."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from hashlib import blake2b
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, ReduceScatterOptions

from .checks import check_positive

T = TypeVar("T")
STATE = 24
"""Bytes that say, before all others, whether every rank is there, and has done the same."""


class Processes:
    """The ranks of a process group, and what was handed to their collectives; made by `processes`.

    Every method but `moved` and `note` is called by all ranks, in the same order.
    """

    def __init__(self, group: Any, timeout: float):
        self._group, self.timeout = weakref.ref(group), timeout
        self.rank, self.num = dist.get_rank(group), dist.get_world_size(group)
        gpu = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        """Where what is exchanged lies."""
        self.reduced = 0
        """Bytes that this rank handed to sums."""
        self.exchanged = 0
        """Bytes of the objects that this rank gave to all others."""
        self.rowed = 0
        """Bytes of whole tensors that were gathered of rows, or whose sum was cut into rows."""
        self._lost, self._refused, self._trail = "", False, _trail()

    @property
    def group(self) -> Any:
        """Not held here: gloo's threads abort an interpreter that ends before `destroy_process_group` could end them."""
        group = self._group()
        if group is None:
            raise RuntimeError(
                "the process group of these ranks was destroyed: make one, and `processes` of it, again."
            )
        return group

    def __repr__(self) -> str:
        return f"Processes(rank {self.rank} of {self.num}, timeout {self.timeout:g} s)"

    @property
    def moved(self) -> float:
        """Bytes that this rank sent by the model: 2 (n - 1) / n of a sum in a ring, half of that for rows, n - 1 objects."""
        return (self.num - 1) / self.num * (2 * self.reduced + self.rowed) + (self.num - 1) * self.exchanged

    def sum(self, x: Float[Tensor, "..."], what: str) -> Float[Tensor, "..."]:
        """The sum over ranks, written into x, with the same bits on every rank."""
        self.note(f"a sum of {tuple(x.shape)} {x.dtype}")
        self.check(what)
        self._reduce(x, dist.ReduceOp.SUM, what)
        return x

    def gathered_rows(self, rows: Float[Tensor, "m ..."], what: str) -> Float[Tensor, "nm ..."]:
        """The rows of all ranks, of which each has as many, one rank after the other."""
        options, out = AllgatherOptions(), rows.new_empty(self.num * len(rows), *rows.shape[1:])
        options.timeout = timedelta(seconds=self.timeout)
        self._check_rows(out, f"gathering {what}")
        self._wait(lambda: self.group._allgather_base(out, rows.contiguous(), options), f"gathering {what}")
        return out

    def summed_rows(self, x: Float[Tensor, "nm ..."], what: str) -> Float[Tensor, "m ..."]:
        """This rank's rows of the sum over ranks. gloo makes the whole sum for it, and moves twice the bytes."""
        options, out = ReduceScatterOptions(), x.new_empty(len(x) // self.num, *x.shape[1:])
        add: Any = dist.ReduceOp.SUM
        options.reduceOp, options.timeout = add, timedelta(seconds=self.timeout)
        self._check_rows(x, f"summing {what}")
        self._wait(lambda: self.group._reduce_scatter_base(out, x.contiguous(), options), f"summing {what}")
        return out

    def note(self, what: str) -> None:
        """Adds to what all ranks must have done in the same order, which the next collective compares."""
        self._trail.update(what.encode() + b"\0")

    def check(self, what: str, failure: str = "") -> None:
        """Raises on every rank where one has failed, or where one has noted something else; all begin anew after it.

        Every collective begins with this one of `STATE` bytes: others of two kinds or sizes, which would be garbage or
        the end of a process, never meet.
        """
        self.note(what)
        trail, self._trail = int.from_bytes(self._trail.digest(), "little", signed=True), _trail()
        state = torch.tensor([bool(failure), trail, ~trail], device=self.device)
        self._reduce(state, dist.ReduceOp.MAX, what)
        failed, most, least = state.tolist()
        self._refused = bool(failed) or most != ~least
        if failed:
            reasons = self._exchanged(pickle.dumps(failure and f"{what}: {failure}"), what)
            if not failure:
                rank = next(rank for rank, reason in enumerate(reasons) if reason)
                raise RuntimeError(f"rank {rank} failed in {reasons[rank]}")
        elif self._refused:
            raise ValueError(
                f"ranks have not done the same up to {what}: all must ask for the same products of the same vectors in the "
                "same order, with the same key and number of threads, of one model whose parameters are used in an order "
                "that no data decide."
            )

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """What all ranks do, with collectives or without: an error of one is one of all, at their next collective."""
        self._refused = False
        try:
            yield
        except Exception as err:
            if not self._refused:
                self.check(what, f"{type(err).__name__}: {err}")
            raise

    def gathered(self, value: T, what: str) -> list[T]:
        """The values of all ranks, by rank."""
        return self.together(what, lambda: value)

    def together(self, what: str, make: Callable[[], T]) -> list[T]:
        """What every rank makes, by rank; an error of one is an error of all."""
        with self.step(what):
            packed = pickle.dumps(make())
        self.check(what)
        return self._exchanged(packed, what)

    def check_same(self, facts: Callable[[], dict[str, str]]) -> None:
        """Raises ValueError on every rank where a fact differs between ranks, with its name."""
        each = self.together("the comparison of ranks", facts)
        for other, theirs in enumerate(each):
            if odd := sorted(name for name in each[0].keys() | theirs.keys() if each[0].get(name) != theirs.get(name)):
                raise ValueError(
                    f"{', '.join(odd)} of rank {other} differ from those of rank 0: every rank must have the same weights, "
                    "the same batches in the same order, and the same settings; load them from the same files, without "
                    "shuffling by a seed of the rank."
                )

    def _check_rows(self, x: Tensor, what: str) -> None:
        self.rowed += x.numel() * x.element_size()
        self.note(f"{tuple(x.shape)} {x.dtype}")
        self.check(what)

    def _exchanged(self, packed: bytes, what: str) -> list[Any]:
        mine = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(self.device)
        self.exchanged += len(mine)
        sizes = [int(size) for size in self._gather(torch.tensor([len(mine)], device=self.device), what)]
        padded = torch.cat([mine, mine.new_zeros(max(sizes) - len(mine))])
        each = zip(self._gather(padded, what), sizes, strict=True)
        return [pickle.loads(one[:size].cpu().numpy().tobytes()) for one, size in each]

    def _reduce(self, x: Tensor, op: Any, what: str) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp, options.timeout = op, timedelta(seconds=self.timeout)
        self.reduced += x.numel() * x.element_size()
        self._wait(lambda: self.group.allreduce([x], options), what)

    def _gather(self, x: Tensor, what: str) -> list[Tensor]:
        options, out = AllgatherOptions(), [torch.empty_like(x) for _ in range(self.num)]
        options.timeout = timedelta(seconds=self.timeout)
        self._wait(lambda: self.group.allgather([out], [x], options), what)
        return out

    def _wait(self, begin: Callable[[], Any], what: str) -> None:
        """A collective, to its end or its timeout."""
        if self._lost:
            self._refused = True
            raise RuntimeError(f"these ranks were lost before, in {self._lost}: start all of them again.")
        try:
            begin().wait()
        except RuntimeError as err:
            self._lost, self._refused = what, True
            raise RuntimeError(
                f"rank {self.rank} of {self.num} has lost another one in {what} ({str(err).splitlines()[0][:150]}): a rank "
                f"has ended, or said nothing for {self.timeout:g} s. See why in its own output, and start all ranks again; "
                "where it was only slower, give `processes` a longer timeout."
            ) from err


def processes(group: Any = None, *, timeout: float | int = 60.0) -> Processes:
    """The ranks of a torch.distributed group, for `sharded` operators, Grams and directional losses. Called by every rank.

    group: a process group; None for all ranks. It stays as it is: its own timeout does not count here.
    timeout: seconds that a rank waits for the others before it raises RuntimeError. A rank that is killed is noticed at once
    by gloo, one that hangs by this. It has to be longer than what the slowest rank needs more than the fastest one for
    one step: making an operator, one product, eight directions.

    Objects are exchanged by `pickle`: ranks trust each other, as torch.distributed does.

    Raises ValueError where no process group was made, and for one that this process is not in.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> processes()
    Processes(rank 0 of 1, timeout 60 s)
    >>> dist.destroy_process_group()
    """
    check_positive("timeout", float(timeout))
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "`processes` needs a process group, and there is none: call `torch.distributed.init_process_group('gloo')` in "
            "a script that `torchrun --nproc-per-node 2` starts."
        )
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError(
            f"`group` must have this process in it, rank {dist.get_rank()}: call this in its own ranks only."
        )
    return Processes(dist.group.WORLD if group is None else group, float(timeout))


def bytes_per_product(num_params: int, itemsize: int, num_ranks: int) -> float:
    """Bytes that each rank sends (and receives) in one product: a ring's sum of the vector and of `STATE` bytes.

    2 (n - 1) / n (P s + 24): each of n - 1 steps of reduction and n - 1 of distribution moves a share of 1 / n.

    >>> bytes_per_product(1000, 4, 2)
    4024.0
    """
    return 2 * (num_ranks - 1) / num_ranks * (num_params * itemsize + STATE)


def _trail() -> Any:
    return blake2b(digest_size=8)


def share_of(num: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Start and stop of a rank's share of `num` things: contiguous, sizes differ by 1 at most, none where there are few.

    >>> [share_of(5, rank, 3) for rank in range(3)], share_of(1, 0, 2)
    ([(0, 1), (1, 3), (3, 5)], (0, 0))
    """
    return rank * num // num_ranks, (rank + 1) * num // num_ranks
