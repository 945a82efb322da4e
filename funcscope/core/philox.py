"""Philox4x64-10 in integer operations of torch: numpy's bits on any device, and the draws that are made of them.

The multiplications of 64 by 64 bits are put together from 32-bit halves in int64, whose overflow wraps around.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
BUMPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
ROUNDS = 10
LOW = 2**32 - 1
AT_ONCE = 2**22
"""Entries that a device draws together: enough for its kernels to outlast their launch, at some 100 MiB of integers."""


def fill(bits: int, first: int, out: Float[Tensor, " n"], distribution: str, block: int) -> None:
    """The blocks from `first` on, of `block` entries each, many at a time, on the device of `out`."""
    for part in out.split(AT_ONCE):
        num = min(block, len(part))
        blocks = range(first, first := first + -(-len(part) // block))
        if distribution == "normal":
            made = part.new_empty(len(blocks), num)
            normals(words(bits, blocks, min(num, block // 2), out.device), made)
        else:
            made = signs(words(bits, blocks, -(-num // 64), out.device))
        part.copy_(made.flatten()[: len(part)])


def uniform(bits: int, num: int, device: torch.device) -> Float[Tensor, " n"]:
    """Multiples of 2^-24 in [0, 1)."""
    parts = []
    for start in range(0, max(1, num), AT_ONCE):
        made = words(bits, [0], -(-min(AT_ONCE, num - start) // 2), device, after=start // 2)
        parts.append(units(made).flatten())
    return torch.cat(parts)[:num]


def words(bits: int, blocks: Sequence[int], num: int, device: torch.device, *, after: int = 0) -> Int[Tensor, "b n"]:
    r"""The first `num` words of 64 bits of each block, as int64: those of `numpy.random.Philox` with 128 bits of key.

    Block b is `Philox(key=[bits % 2**64, bits >> 64], counter=[0, b, 0, 0]).random_raw(num)`. Per round, with the counter
    $(c_0, c_1, c_2, c_3)$, the key $(k_0, k_1)$ and $M_i c = 2^{64} h_i(c) + l_i(c)$,

    $$(c_0, c_1, c_2, c_3) \to (h_1(c_2) \oplus c_1 \oplus k_0,\; l_1(c_2),\; h_0(c_0) \oplus c_3 \oplus k_1,\; l_0(c_0)).$$

    after: skip as many words, a multiple of 4.

    Salmon, Moraes, Dror, Shaw (2011), Parallel random numbers: as easy as 1, 2, 3, section 3.3.

    >>> from numpy.random import Philox
    >>> found = words(2**64 + 7, [3], 5, torch.device("cpu")).numpy().view("uint64")
    >>> bool((found == Philox(key=[7, 1], counter=[0, 3, 0, 0]).random_raw(5)).all())
    True
    """
    # one copy to the device for all constants: factors, their halves, a key per round
    table = [MULTIPLIERS, [m & LOW for m in MULTIPLIERS], [m >> 32 for m in MULTIPLIERS], *_keys(bits)]
    constants = torch.tensor([[_signed(x) for x in row] for row in table], device=device)[..., None, None]
    counters = -(-num // 4)
    even = torch.zeros(2, len(blocks), counters, dtype=torch.int64, device=device)  # c0 and c2
    odd = torch.zeros_like(even)  # c1 and c3
    even[0] = torch.arange(counters, device=device) + (after // 4 + 1)  # numpy counts before it makes the first
    odd[0] = torch.tensor(blocks, dtype=torch.int64, device=device)[:, None]
    for each in constants[3:]:
        high, low = _product(even, constants)
        even, odd = high.flip(0) ^ odd ^ each, low.flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]], -1).view(len(blocks), 4 * counters)[:, :num]


def signs(words: Int[Tensor, "b n"]) -> Float[Tensor, "b m"]:
    """64 signs of each word: its bytes from the lowest on, the highest bit of each first, as `numpy.unpackbits` has them."""
    octets = words.contiguous().view(torch.uint8)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=words.device)
    return ((octets[..., None] >> places) & 1).flatten(1).float().mul_(2.0).sub_(1.0)


def units(words: Int[Tensor, "b n"]) -> Float[Tensor, "b m"]:
    """Two multiples of 2^-24 in [0, 1) of each word: the upper 24 bits of its lower half, then of its upper half."""
    halves = words.contiguous().view(torch.int32)
    return ((halves >> 8) & (2**24 - 1)).float().mul_(2.0**-24)


def normals(words: Int[Tensor, "b n"], out: Float[Tensor, "b m"]) -> None:
    r"""Fill rows of n to 2n entries with standard normal numbers, by Box and Muller in float32.

    With u the lower 31 bits of a word plus 1/2 as a fraction of 2^31, and v its upper half as a signed fraction of 2^31,

    $$z_i = \sqrt{-2 \ln u_i} \cos \pi v_i, \qquad z_{n + i} = \sqrt{-2 \ln u_i} \sin \pi v_i:$$

    entries beyond n take the sines, so that a shorter row is the beginning of a longer one of as many words. The largest
    is $\sqrt{64 \ln 2}$ = 6.66, beyond which are 2.7e-11 of all normal numbers. u and v have the same bits everywhere, z the
    rounding of the device's logarithm and cosine.
    """
    num = words.shape[1]
    halves = words.contiguous().view(torch.int32)
    radii = (halves[:, ::2] & (2**31 - 1)).float().add_(0.5).mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
    angles = halves[:, 1::2].float().mul_(math.pi * 2.0**-31)
    torch.mul(radii, angles.cos(), out=out[:, :num])
    if rest := out.shape[1] - num:
        torch.mul(radii[:, :rest], angles[:, :rest].sin_(), out=out[:, num:])


def _product(x: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 64 bits of x times the factors, unsigned: schoolbook in halves of 32 bits."""
    whole, lower, upper = constants[:3]
    low, high = x & LOW, _upper(x)
    carry = torch.addcmul(_upper(low * lower), high, lower)
    middle = torch.addcmul(carry & LOW, low, upper)
    return torch.addcmul(_upper(carry), high, upper) + _upper(middle), x * whole


def _upper(x: Tensor) -> Tensor:
    return (x >> 32) & LOW  # the shift is arithmetic: it brings copies of the sign


def _keys(bits: int) -> Iterator[list[int]]:
    """The two words of the key in each round."""
    own = bits & (2**64 - 1), bits >> 64
    return ([(k + i * bump) & (2**64 - 1) for k, bump in zip(own, BUMPS, strict=True)] for i in range(ROUNDS))


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
