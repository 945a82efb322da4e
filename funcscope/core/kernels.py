"""The kernel of a Hugging Face model's attention: which one it has, which ones it can be given, what one cannot be asked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .architectures import has_alibi
from .attention_blocks import calls_by_name, use_blocks
from .attention_parts import takes_parts, use_parts
from .imported import Model


def takes_blocks(model: Model) -> bool:
    """Whether a model's attention can be taken by blocks of queries."""
    return calls_by_name(model) or takes_parts(model)


def use_kernel(skeleton: Model, attention: str) -> None:
    """Give it the kernel of that name, other than `keep`."""
    _check_own(skeleton)
    if attention == "blocks" and not takes_blocks(skeleton):
        raise ValueError(
            f"the attention of {type(skeleton).__name__} is its own affair and cannot be taken in blocks of queries: pass "
            '`attention="eager"` instead of "blocks"; its memory grows with the square of the length.'
        )
    if attention == "math" and not skeleton._supports_sdpa:
        raise ValueError(
            f'{type(skeleton).__name__} has one kernel of its own: pass `attention="eager"` instead of "math".'
        )
    if attention in ("auto", "blocks"):
        (use_parts if takes_parts(skeleton) else use_blocks)(skeleton)
        return
    fused = attention == "math" or (_has_two_biases(skeleton) and skeleton.config._attn_implementation != "eager")
    name = "sdpa" if fused else "eager"
    if skeleton._can_set_attn_implementation():
        skeleton.set_attn_implementation(name)
    else:
        skeleton.config._attn_implementation = name  # where modules read it at every call, transformers only warns


def check_asked(inputs: Any, attention: str) -> None:
    """Raises ValueError for inputs that make a model something else than a function of its parameters, or a kernel fail."""
    if not isinstance(inputs, Mapping):
        return
    for name in ("past_key_values", "cache", "cache_params"):
        if inputs.get(name) is not None:
            raise ValueError(
                f"`{name}` is a cache: what is in it came from other calls, and the model writes to it, so that it is no "
                "function of its parameters. Pass whole sequences without it."
            )
    if inputs.get("output_attentions") and attention in ("auto", "blocks"):
        raise ValueError(
            f"`output_attentions` needs whole scores, got attention={attention!r}: make the functional with "
            '`attention="eager"`.'
        )


def _check_own(skeleton: Model) -> None:
    """An attention that a user has registered is a part of the model."""
    known = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    names = {getattr(getattr(part, "config", None), "_attn_implementation", None) for part in skeleton.modules()}
    for name in names & set(known.keys()):
        if known[name].__module__.partition(".")[0] not in ("transformers", "funcscope"):
            raise ValueError(
                f"the model's attention {name!r} is a function that is registered by other code, which another kernel would "
                'replace: pass `attention="keep"`, or give the model one of its own (`set_attn_implementation("eager")`) '
                "before."
            )


def _has_two_biases(skeleton: Model) -> bool:
    """Whether eager attention adds distances to the scores and to the mask, the fused one to the mask alone.

    Those are two models: the kernel that it was made with says which.
    """
    return skeleton.config.model_type == "falcon" and has_alibi(skeleton.config)
