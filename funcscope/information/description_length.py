"""How many bits it takes to write down a model and then the data with it: two-part codes, and compressed weights."""

from __future__ import annotations

import lzma
import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_instance, check_positive
from ..core.objective import Loss, Theta
from ..core.result import Result, quantity
from ..core.standard_errors import means
from ..core.tables import counted

CONSTANT = math.log2(2.8651085)
"""What makes the lengths of the integers those of a code: Rissanen's constant, rounded up (proofs/log_star.py)."""
SCALE_BITS = 32
"""For the step of one parameter, a float32."""


class DescriptionLength(Result):
    """Bits of a two-part code: the quantised weights, then the labels by the model that these are. `description_length`."""

    total_bits: float = quantity("description length", unit="bits")
    weight_bits: float = quantity("bits of the weights", unit="bits")
    data_bits: float = quantity("bits of the labels", unit="bits")
    distortion_bits: float = quantity(
        "bits of the labels that quantising costs", unit="bits", stderr="distortion_bits_stderr"
    )
    distortion_bits_stderr: float
    """Of the same number of sequences, drawn again."""
    codebook_bits: float = quantity("of the weights, bits of histograms and steps", unit="bits")
    bits_per_parameter: float = quantity("bits per parameter", unit="bits")
    bits_per_token: float = quantity("bits of the labels per scored token", unit="bits")
    leaf_bits: Float[Tensor, " l"] = quantity("bits by parameter", unit="bits", per="leaf")
    names: list[str]
    num_parameters: int
    num_tokens: float
    step: float

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"leaf": self.names}

    @property
    def head(self) -> str:
        return f"two-part code of {counted(self.num_parameters, 'parameter')} and {self.num_tokens:,.0f} tokens"

    @property
    def notes(self) -> list[str]:
        made = [
            f"Bits of {self.num_tokens:,.0f} tokens are added to bits of the weights: the total is of these data, and of no "
            "other number of them. Architecture, buffers and frozen parameters are known to both sides."
        ]
        if not math.isfinite(self.data_bits):
            made.append("the quantised model gives no finite loss: the step is too wide.")
        return made


class CompressedWeights(Result):
    """What a general compressor makes of the bytes of weights: `compressed_weights`."""

    bits_per_parameter: float = quantity("compressed bits per parameter, quantised", unit="bits")
    raw_bits_per_parameter: float = quantity("compressed bits per parameter, as they are", unit="bits")
    entropy_per_parameter: float = quantity("entropy of the quantised weights", unit="bits")
    """Of the empirical distribution within each parameter tensor: no code without its histogram."""
    step: float
    num_parameters: int

    @property
    def head(self) -> str:
        return f"{counted(self.num_parameters, 'parameter')} through lzma"


class Quantised(NamedTuple):
    """One tensor as multiples of a step."""

    integers: np.ndarray
    step: float
    values: Tensor
    """In float32 at least, in the tensor's shape."""


def universal_integer_bits(n: int) -> float:
    r"""Length of the code for the integers n >= 1, in bits: Rissanen's universal prior.

    $$L^*(n) = \log_2 2.8651085 + \log_2 n + \log_2 \log_2 n + \dots,$$

    positive terms only. With the constant the lengths satisfy Kraft's inequality, $\sum_n 2^{-L^*(n)} \le 1$, so that a
    prefix code of these lengths (rounded up) exists; without it, the sum over n up to 300,000 alone is 2.35, and with the
    published constant, 2.865064, the whole of it is above 1 by 1.5e-5. Proof: proofs/log_star.py.

    Raises ValueError for n below 1, and for what is no integer.

    Rissanen (1983), doi:10.1214/aos/1176346150.

    >>> round(universal_integer_bits(1), 4), round(universal_integer_bits(16), 4)         # 16: + 4 + 2 + 1
    (1.5186, 8.5186)
    """
    if not isinstance(n, Integral) or n < 1:
        raise ValueError(f"`n` must be an integer of at least 1, got {n}: add 1 to what may be 0.")
    bits, term = CONSTANT, math.log2(n)
    while term > 0:
        bits, term = bits + term, math.log2(term)
    return bits


def description_length(loss: Loss, theta: Theta, *, step: float) -> DescriptionLength:
    r"""Two-part code of a model and of the labels of some data, in bits.

    $$L = \underbrace{\textstyle\sum_l L(q_l)}_{\text{weights}} + \underbrace{\textstyle\sum_i -\log_2 p(y_i \mid x_i,
      \hat\theta)}_{\text{labels}}, \qquad q = \mathrm{round}(\theta / \Delta_l), \quad \hat\theta = \Delta_l\, q,$$

    with $\Delta_l$ `step` times the root mean square of parameter tensor l (in float32; `step` itself where all are 0). The
    integers are not clipped. Given how many weights there are, a tensor's code is its lowest and its number of levels
    (`universal_integer_bits`), its histogram among all histograms of so many levels, and its place among all
    arrangements of that, K levels and n weights with counts $n_k$:

    $$L(q) = 32 + L^*(\mathrm{zigzag}(\min q)) + L^*(K) + \log_2 \tbinom{n + K - 1}{K - 1} + \log_2 \tfrac{n!}{\prod n_k!},$$

    a complete code once K is known: nothing is left out, and no entropy stands in for a code. The labels are coded by the
    quantised model, which is what the receiver has: `distortion_bits` is what that costs over the full weights, with its
    error over sequences; the other bits are lengths, and have none. Compare totals on the same data only; where
    the step is chosen among several by its total, the choice takes bits, too.

    Raises ValueError for losses that are no log-likelihood, for weights that are not finite, and for a step that is not
    above 0 or out of the range of float32.

    Rissanen (1978), doi:10.1016/0005-1098(78)90005-5; Grünwald (2007), The minimum description length principle.

    >>> import torch, funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(3, 2))
    >>> loss = fs.objective(net, [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))], fs.classification)
    >>> made = description_length(loss, 0 * net.theta, step=0.1)
    >>> round(made.data_bits, 6), made.num_tokens, made.weight_bits == made.codebook_bits      # nothing to tell apart
    (4.0, 4.0, True)
    """
    check_positive("step", step)
    check_instance("loss", loss, Loss, "`fs.objective(fs.functional(model), batches, criterion)`")
    if loss.criterion.unit != "nats":
        raise ValueError(
            f"`loss` must be a cross-entropy in nats, got {loss.criterion.name} in {loss.criterion.unit}: other losses are "
            "no length of a code."
        )
    leaves = loss.wide_leaves(theta)
    made = {name: quantised(value, step, name) for name, value in leaves.items()}
    books, places = zip(*(integer_bits(each.integers) for each in made.values()), strict=True)
    with torch.no_grad():
        at, weights = loss.terms({name: each.values for name, each in made.items()})
        full, _ = loss.terms(leaves)
    both = torch.stack([at, at - full]).double().cpu() / math.log(2)
    data, apart = both.sum(1).tolist()
    tokens = float(weights.sum())
    stderr = float(means(both[1:], weights).stderr[0]) * tokens
    per_leaf = torch.tensor([a + b for a, b in zip(books, places, strict=True)], dtype=torch.float64)
    num = sum(each.integers.size for each in made.values())
    return DescriptionLength(
        total_bits=float(per_leaf.sum()) + data, weight_bits=float(per_leaf.sum()), data_bits=data, distortion_bits=apart,
        distortion_bits_stderr=stderr, codebook_bits=float(sum(books)), bits_per_parameter=float(per_leaf.sum()) / num,
        bits_per_token=data / tokens, leaf_bits=per_leaf, names=list(made),
        num_parameters=num, num_tokens=tokens, step=step,
    )  # fmt: skip


def compressed_weights(params: Mapping[str, Tensor], *, step: float) -> CompressedWeights:
    r"""Bits per parameter that lzma needs for the weights: as they are, and in multiples of a step.

    $8 \cdot \mathrm{len}(\mathrm{lzma}(\text{bytes})) / P$. Mantissas are noise, so that the weights as they are hardly
    compress, whatever they have learnt; those of quantised weights depend on the step, which is `step` times the root mean
    square of each tensor. A compressor finds repetitions; it knows no distribution, and may need more than the entropy.

    params: by name, in the order in which they are written. Raises ValueError for a step that is not above 0, for weights
    that are not finite and where there are none.

    >>> import torch
    >>> made = compressed_weights({"w": torch.ones(4096)}, step=0.5)
    >>> made.bits_per_parameter < 0.3, made.entropy_per_parameter
    (True, 0.0)
    """
    check_positive("step", step)
    if not params or not sum(value.numel() for value in params.values()):
        raise ValueError("`params` must hold a weight at least.")
    made = [quantised(value, step, name) for name, value in params.items()]
    num = sum(each.integers.size for each in made)
    counts = [np.unique(each.integers, return_counts=True)[1] for each in made]
    entropy = sum(float(scipy.stats.entropy(each, base=2)) * each.sum() for each in counts)
    raw = b"".join(_bytes(value) for value in params.values())
    small = b"".join(each.integers.astype(_integer_type(each.integers)).tobytes() for each in made)
    return CompressedWeights(
        bits_per_parameter=8 * len(lzma.compress(small)) / num,
        raw_bits_per_parameter=8 * len(lzma.compress(raw)) / num,
        entropy_per_parameter=float(entropy) / num,
        step=step,
        num_parameters=num,
    )


def quantised(value: Float[Tensor, "..."], step: float, name: str = "weights") -> Quantised:
    """Rounded to multiples of `step` times its root mean square; raises ValueError for what is not finite, and for a step
    that is no float32 or by which there are more levels than integers of 53 bits."""
    if not bool(value.isfinite().all()):
        raise ValueError(f"`{name}` must be finite: weights that are nan or infinite have no code, look at the model.")
    x = value.detach().cpu().double()
    size = float(x.square().mean().sqrt()) if x.numel() else 0.0
    width = step * size if size > 0 else step
    width = float(np.float32(width)) if width <= float(np.finfo(np.float32).max) else math.inf
    if not (0 < width < math.inf and (not x.numel() or float(x.abs().max()) / width < 2**53)):
        raise ValueError(
            f"`step` must give a float32 above 0, and integers below 2**53, got {step:g}, which makes {width:g} of "
            f"`{name}`, whose root mean square is {size:.3g}: a step from 1e-4 to 1 serves."
        )
    integers = torch.round(x / width).long()
    return Quantised(integers.numpy().ravel(), width, (integers.double() * width).to(value))


def integer_bits(integers: np.ndarray) -> tuple[float, float]:
    """Bits of the codebook and of the integers by it: see `description_length`."""
    num = integers.size
    if not num:
        return 0.0, 0.0
    low, high = int(integers.min()), int(integers.max())
    counts, levels = np.unique(integers, return_counts=True)[1], high - low + 1
    place = 2 * low + 1 if low >= 0 else -2 * low  # 0, -1, 1, -2, ... as 1, 2, 3, 4, ...
    histogram = _log_factorial(num + levels - 1) - _log_factorial(levels - 1) - _log_factorial(num)
    arrangement = _log_factorial(num) - float(_log_factorial(counts).sum())
    book = SCALE_BITS + universal_integer_bits(place) + universal_integer_bits(levels) + float(histogram) / math.log(2)
    return book, arrangement / math.log(2)


def _log_factorial(n: Any) -> Any:
    return scipy.special.gammaln(np.asarray(n, dtype=np.float64) + 1)


def _integer_type(integers: np.ndarray) -> type:
    """The narrowest that holds them."""
    size = int(np.abs(integers).max()) if integers.size else 0
    return next(each for each in (np.int8, np.int16, np.int32, np.int64) if size <= np.iinfo(each).max)


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
