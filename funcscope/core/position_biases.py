"""Biases of attention that a model learns for distances (T5): one number a head and distance, instead of one a pair."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from .imported import Model


def give_briefly(skeleton: Model) -> None:
    """Have a model pass its biases on in brief, where it has such ones."""
    for module in skeleton.modules():
        if has_distances(module):
            module.register_forward_pre_hook(_with_brief, with_kwargs=True)


def has_distances(module: nn.Module) -> bool:
    """Whether it is an attention whose scores have a bias of their distance, or could have had one."""
    return hasattr(module, "compute_bias") and hasattr(module, "has_relative_attention_bias")


def taken(bias: Float[Tensor, "1 h q d"], queries: slice, keys: slice, num: int) -> Float[Tensor, "1 h r k"]:
    """The biases of some of `num` queries for some keys; one that is not in brief is of all pairs.

    In brief, entry d is that of a key d - num + 1 positions after the query.
    """
    if bias.shape[-2] != 1 or num == 1:
        return bias[..., queries, keys]
    (first_row, last_row, _), (begin, end, _) = queries.indices(num), keys.indices(num)
    rows, width = last_row - first_row, end - begin
    first = begin - last_row + num  # of the last query for the first key
    return _diagonals(bias[:, :, 0, first : first + rows + width - 1], rows)


def _diagonals(x: Float[Tensor, "1 h n"], rows: int) -> Float[Tensor, "1 h r k"]:
    """Row i holds what begins at its entry rows - 1 - i.

    Of a copy for each row and one entry more, read in rows that are one entry shorter: each begins one entry earlier. Its
    derivatives are sums over whole rows, where those of an index for each pair add one number after the other.
    """
    num = x.shape[-1]
    copies = nn.functional.pad(x, (0, 1))[..., None, :].expand(*x.shape[:-1], rows, num + 1)
    return copies.flatten(-2)[..., : rows * num].unflatten(-1, (rows, num))[..., rows - 1 :]


def _with_brief(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A bias in brief where none is given; of no entries where the scores have none."""
    if kwargs.get("position_bias") is not None:
        return args, kwargs
    hidden = args[0] if args else kwargs["hidden_states"]
    num = hidden.shape[1]
    if module.has_relative_attention_bias:  # one query at the end of the first, and all keys from there on
        bias = module.compute_bias(1, 2 * num - 1, device=hidden.device, past_seen_tokens=num - 1)
    else:
        bias = hidden.new_zeros(1, module.n_heads, 1, 0)
    return args, {**kwargs, "position_bias": bias}
