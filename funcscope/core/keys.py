"""Random numbers without a global generator: a 128-bit key, children by name or index, draws by block.

A draw is a pure function of (key, block, length of the block). Block `b` of a draw holds the entries
`b * BLOCK ... (b + 1) * BLOCK`, so a long vector can be drawn whole, in part, again, or on several threads, with the
same numbers every time. All draws are made in float32 and then cast, so that every dtype sees the same direction.

A key has a stream. Draws of the stream "cpu" are made on the CPU and moved: every device has the same bits. Those of the
stream "device" are made where they are used (core/philox.py), on the CPU, too: signs and uniform numbers have the bits of
the other stream, normal numbers are others, which agree between devices up to the rounding of a logarithm and a cosine.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from numbers import Integral
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import philox
from .checks import check_choice
from .pack import UNUSUAL, storable

Distribution = Literal["normal", "rademacher"]
Stream = Literal["cpu", "device"]

BLOCK = 2**16
"""Entries per block: 256 KiB of float32 stay in a core's cache while they are drawn."""
CPU = torch.device("cpu")


@storable
@dataclass(frozen=True)
class Key:
    """A node of the tree of random streams: 128 bits, hashable, the root seed that it came from, and where it draws."""

    bits: int
    seed: int
    stream: Stream = field(default="cpu", metadata=UNUSUAL)

    def __repr__(self) -> str:
        return f"Key({self.bits:032x}, seed={self.seed}{'' if self.stream == 'cpu' else f', stream={self.stream!r}'})"


def key(seed: int, *, stream: Stream = "cpu") -> Key:
    """The root key of an integer seed of any size and sign.

    stream: `cpu` draws on the CPU and moves the numbers, which have the same bits on every device. `device` draws on the
    device of what the numbers are for. Its signs and uniform numbers are those of `cpu`. Its normal numbers are another
    stream than the CPU's, equal on every device up to the rounding of a float32 logarithm and cosine: some 1e-6. The stream
    is the key's and its children's, and is stored with it.

    >>> key(42) == key(42), key(1) == key(1 + 2**32), key(1) == key(1, stream="device")
    (True, False, False)
    """
    check_choice("stream", stream, get_args(Stream))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"`seed` must be a Python integer, got {seed!r}: `fs.key(0)`, or `fs.key(int(seed))` of a number."
        )
    return Key(_digest(b"root", str(seed).encode()), seed, stream)


def check_key(key: object) -> None:
    """`key` is a key and not a bare seed."""
    if not isinstance(key, Key):
        seed = int(key) if isinstance(key, Integral) and not isinstance(key, bool) else 0
        what = key if isinstance(key, (int, float, str, type(None))) else f"a {type(key).__name__}"
        raise TypeError(f"`key` must be a key, made of an integer seed, got {what!r}: write `key=fs.key({seed})`.")


def fold_in(key: Key, data: str | int) -> Key:
    """The child of `key` with this name or index; children of different names, or of 1 and "1", are unrelated.

    >>> fold_in(key(0), 1) == fold_in(key(0), "1")
    False
    """
    check_key(key)
    tag = b"s" if isinstance(data, str) else b"i"
    return Key(_digest(key.bits.to_bytes(16, "little"), tag + str(data).encode()), key.seed, key.stream)


def normal(key: Key, like: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Independent standard normal numbers with the shape, dtype and device of `like`.

    Box-Muller on a Mersenne Twister whose 624 state words come from Philox at 128 bits of key and the block number.
    Equal on every machine up to the rounding of its float32 logarithm and cosine. Of a key with the stream "device":
    Box-Muller on Philox itself, on the device of `like`.

    >>> bool((normal(key(0), torch.zeros(3)) == normal(key(0), torch.zeros(3))).all())
    True
    """
    return random(key, like, "normal")


def rademacher(key: Key, like: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Independent random signs, -1 or +1 with probability 1/2, with the shape, dtype and device of `like`.

    >>> float(rademacher(key(0), torch.zeros(1000)).abs().sum())
    1000.0
    """
    return random(key, like, "rademacher")


def random(key: Key, like: Float[Tensor, "..."], distribution: Distribution) -> Float[Tensor, "..."]:
    """`normal` or `rademacher`, by name."""
    return draw(key, like.numel(), distribution, device=like.device).view(like.shape).to(like)


def uniform(key: Key, like: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Independent numbers, uniform on the 2^24 multiples of 2^-24 in [0, 1), with shape, dtype and device of `like`.

    A dtype narrower than float32 rounds some of them up to 1.

    >>> float(uniform(key(0), torch.zeros(9)).max()) < 1
    True
    """
    check_key(key)
    if (place := drawn_on(key, like.device)).type != "cpu":
        return philox.uniform(key.bits, like.numel(), place).view(like.shape).to(like)
    words = _tools().philox_at(key, 0).random_raw(-(-like.numel() // 2)).view(np.uint32)
    unit = (words[: like.numel()] >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy(unit).view(like.shape).to(like)


def drawn_on(key: Key, device: torch.device) -> torch.device:
    """Where the numbers of this key are made that are used on `device`."""
    return device if key.stream == "device" else CPU


def fill(key: Key, out: Float[Tensor, " n"], distribution: Distribution) -> None:
    """Write the draw of `key` into a contiguous float32 vector that lies where it draws, on the calling thread."""
    if drawn_on(key, out.device) != out.device:
        raise ValueError(f"a key of the stream 'cpu' draws on the CPU, and `out` is on {out.device}: copy from there.")
    if out.device.type != "cpu":
        philox.fill(key.bits, 0, out, distribution, BLOCK)
        return
    for block in range(-(-len(out) // BLOCK)):
        _fill_block(key, block, out[block * BLOCK : (block + 1) * BLOCK], distribution)


@contextmanager
def as_global_generator(key: Key) -> Iterator[None]:
    """For a library that draws from torch's generator of the CPU: within, that is the key's; afterwards, what it was.

    >>> with as_global_generator(key(0)):
    ...     first = torch.rand(2)
    >>> with as_global_generator(key(0)):
    ...     torch.equal(torch.rand(2), first)
    True
    """
    tools = _tools()
    state = tools.seeded(tools.philox_at(key, 0).random_raw(312)).get_state()
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        yield


def on_workers(job: Callable[[int], None], starts: Iterable[int]) -> None:
    """Run a job from each start on torch's number of worker threads, and wait.

    Worker threads carry none of the caller's function transforms or modes, so that a draw inside `vmap` is a constant
    to it: neither mapped nor refused.
    """
    for done in [_pool(torch.get_num_threads()).submit(job, start) for start in starts]:
        done.result()


def draw(
    key: Key,
    num: int,
    distribution: Distribution,
    start: int = 0,
    stop: int | None = None,
    *,
    device: torch.device = CPU,
) -> Float[Tensor, " m"]:
    """Entries `start` to `stop` of a draw of `num`, in float32 on `device`; on the CPU the worker threads draw them."""
    check_key(key)
    place = drawn_on(key, device)
    stop = num if stop is None else stop
    first, last = start // BLOCK, -(-stop // BLOCK)
    origin = first * BLOCK
    with torch.inference_mode(False):  # workers may not write to an inference tensor
        out = torch.empty(min(last * BLOCK, num) - origin, device=place)
        if place.type != "cpu":
            philox.fill(key.bits, first, out, distribution, BLOCK)
            return out[start - origin : stop - origin]
    share = max(1, -(-(last - first) // torch.get_num_threads()))

    def part(begin: int) -> None:
        for block in range(begin, min(begin + share, last)):
            at = block * BLOCK - origin
            _fill_block(key, block, out[at : at + BLOCK], distribution)

    on_workers(part, range(first, last, share))
    return out[start - origin : stop - origin].to(device)


def draw_spans(
    key: Key,
    num: int,
    distribution: Distribution,
    spans: Iterable[tuple[int, int]],
    *,
    device: torch.device = CPU,
) -> Float[Tensor, " m"]:
    """Entries of a draw of `num` from start to stop of each span, in ascending order; each block that they need, once.

    >>> whole = draw(key(0), 9, "normal")
    >>> torch.equal(draw_spans(key(0), 9, "normal", [(1, 3), (7, 9)]), whole[[1, 2, 7, 8]])
    True
    """
    runs: list[list[tuple[int, int]]] = []
    for start, stop in spans:
        if stop > start and runs and start // BLOCK <= (runs[-1][-1][1] - 1) // BLOCK:
            runs[-1].append((start, stop))
        elif stop > start:
            runs.append([(start, stop)])
    out = [torch.empty(0, device=device)]
    for run in runs:
        first = run[0][0]
        drawn = draw(key, num, distribution, first, run[-1][1], device=device)
        out += [drawn[start - first : stop - first] for start, stop in run]
    return torch.cat(out)


def _fill_block(key: Key, block: int, out: Tensor, distribution: Distribution) -> None:
    tools = _tools()
    source = tools.philox_at(key, block)
    if distribution == "normal" and key.stream == "device":
        words = source.random_raw(min(len(out), BLOCK // 2)).view(np.int64)
        philox.normals(torch.from_numpy(words)[None], out[None])
    elif distribution == "normal":
        out.normal_(generator=tools.seeded(source.random_raw(312)))
    else:
        bits = np.unpackbits(source.random_raw(-(-len(out) // 64)).view(np.uint8), count=len(out))
        torch.mul(torch.from_numpy(bits), 2.0, out=out).sub_(1.0)


class _Tools(threading.local):
    """One thread's generators, set anew for every block: making them takes several times as long."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.at = self.philox.state
        self.generator = torch.Generator()
        self.state = self.generator.get_state()
        self.words = self.state.numpy()[24 : 24 + 8 * 624].view(np.uint64)

    def philox_at(self, key: Key, block: int) -> np.random.Philox:
        """Philox with this key, its counter at the block's place: equal to `Philox(key=..., counter=[0, block, 0, 0])`."""
        self.at["state"]["key"][:] = _words(key)
        self.at["state"]["counter"][:] = (0, block, 0, 0)
        self.philox.state = self.at  # with an empty buffer, as `at` was taken from a fresh one
        return self.philox

    def seeded(self, words: np.ndarray) -> torch.Generator:
        """The generator with these 624 words of 32 bits as its state: `manual_seed` would keep 32 bits of a key only."""
        self.words[:] = words.view(np.uint32)
        return self.generator.set_state(self.state)


@cache
def _tools() -> _Tools:
    return _Tools()


def _words(key: Key) -> np.ndarray:
    return np.frombuffer(key.bits.to_bytes(16, "little"), np.uint64)  # of a list, numpy would make float64 at times


def _digest(salt: bytes, data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, key=salt, digest_size=16).digest(), "little")


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="funcscope-draw")
