"""The families of Hugging Face models that are known here: how each masks its attention, and what else it does.

A line of `FAMILIES` is a claim about a model type. tests/test_architectures.py compares a small model of every line with
the untouched one: values, gradients and Hessian products, the dtype that it computes in, and its head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from transformers import PreTrainedConfig


class Family(NamedTuple):
    """What is known of one model type."""

    attention: Literal["causal", "encoder", "both"] = "causal"
    """encoder: in both directions, unless it was made a decoder. both: an encoder and a decoder."""
    window: Literal["none", "all layers", "by type"] = "none"
    """Which layers have the `sliding_window` of the configuration, if it has one: those whose type says so, or all."""
    packs: bool = True
    """Position ids that start again inside a row, without a mask, are sequences which do not see each other."""
    alibi: bool = False
    """Biases grow with the distance in tokens, which the model counts in the 2-D mask: it is passed on as it is.

    Where a configuration has `alibi`, only if that is true.
    """
    counted: bool = False
    """Positions are counted in the 2-D mask where they are not given."""
    clean: bool = False
    """Computes in the dtype of its parameters; the others take norms or softmax in float32 whatever that is."""
    linear_head: bool = True
    """The logits of the causal model are one linear map of the last hidden states, if none is capped by `config`."""


FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers, as configurations name them."""

_ENCODER = Family("encoder", clean=True, linear_head=False)

FAMILIES: dict[str, Family] = {
    "albert": _ENCODER,
    "apertus": Family(),
    "arcee": Family(),
    "bert": _ENCODER,
    "biogpt": Family(packs=False, clean=True),
    "bloom": Family(packs=False, alibi=True),
    "camembert": _ENCODER,
    "codegen": Family(),
    "cohere": Family(linear_head=False),
    "cohere2": Family(window="by type", linear_head=False),
    "distilbert": _ENCODER,
    "electra": _ENCODER,
    "ernie": _ENCODER,
    "ernie4_5": Family(),
    "exaone4": Family(window="by type"),
    "falcon": Family(alibi=True, clean=True),
    "gemma": Family(),
    "gemma2": Family(window="by type"),
    "gemma3_text": Family(window="by type"),
    "glm": Family(),
    "glm4": Family(),
    "gpt2": Family(clean=True),
    "gpt_bigcode": Family(),
    "gpt_neo": Family(),
    "gpt_neox": Family(),
    "gptj": Family(),
    "granite": Family(linear_head=False),
    "helium": Family(),
    "hunyuan_v1_dense": Family(),
    "llama": Family(),
    "ministral": Family(window="by type"),
    "ministral3": Family(window="all layers"),
    "mistral": Family(window="all layers"),
    "mpt": Family(packs=False),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(window="by type"),
    "opt": Family(packs=False, counted=True),
    "persimmon": Family(),
    "phi": Family(),
    "phi3": Family(window="all layers"),
    "qwen2": Family(window="by type"),
    "qwen3": Family(window="by type"),
    "roberta": _ENCODER,
    "seed_oss": Family(),
    "smollm3": Family(window="by type"),
    "stablelm": Family(),
    "starcoder2": Family(window="all layers"),
    "t5": Family("both", linear_head=False),
    "xlm-roberta": _ENCODER,
}


def family_of(config: PreTrainedConfig) -> Family | None:
    """What is known of a model with this configuration; None where nothing is.

    >>> from transformers import GPT2Config, MambaConfig
    >>> family_of(GPT2Config()).clean, family_of(MambaConfig())
    (True, None)
    """
    family = FAMILIES.get(config.model_type)
    if family is None or (family.attention == "causal" and _sees_what_follows(config)):
        return None
    return family


def names() -> str:
    """The known model types, in the order of the alphabet.

    >>> names().startswith("albert, apertus, arcee, bert")
    True
    """
    return ", ".join(sorted(FAMILIES))


def computes_in_float32(config: PreTrainedConfig) -> bool:
    """Are norms or softmax taken in float32 whatever the dtype of the parameters? True where it is not known."""
    family = family_of(config)
    return family is None or not family.clean


def has_linear_head(config: PreTrainedConfig) -> bool:
    """Are the logits of the causal model one linear map of the last hidden states? False where it is not known."""
    family = family_of(config)
    return family is not None and family.linear_head and not getattr(config, "final_logit_softcapping", None)


def has_alibi(config: PreTrainedConfig) -> bool:
    """Is the attention biased by distances that the model counts in the 2-D mask?"""
    family = family_of(config)
    return family is not None and family.alibi and getattr(config, "alibi", True)


def window(config: PreTrainedConfig) -> tuple[int | None, bool]:
    """The length of the sliding window, None where no layer has one; and whether layers of both types are there."""
    family = family_of(config)
    kind = "none" if family is None else family.window
    types = set(getattr(config, "layer_types", None) or ()) if kind == "by type" else {SLIDING}
    if kind == "none" or SLIDING not in types:
        return None, False
    return config.sliding_window, len(types) > 1


def remedy(config: PreTrainedConfig) -> str:
    """What can be had of a model whose masks are not known here."""
    if set(layer_types(config)) == {FULL, SLIDING}:
        return f"pass a mapping of two float masks of shape (batch, 1, tokens, tokens), {FULL!r} and {SLIDING!r}, or {_KEEP}"
    return _KEEP


def layer_types(config: PreTrainedConfig) -> tuple[str, ...]:
    """The types of layers that a configuration names, each once."""
    return tuple(sorted(set(getattr(config.get_text_config(), "layer_types", None) or ())))


_KEEP = (
    'make the functional with `attention="keep"`, under which the model masks itself: values and gradients are right '
    "there, and `hessian_difference` up to the error of its step."
)


def _sees_what_follows(config: PreTrainedConfig) -> bool:
    return getattr(config, "is_causal", True) is False or bool(getattr(config, "use_bidirectional_attention", False))
