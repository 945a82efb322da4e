"""The families of Hugging Face models that are known here: how each masks its attention, and what else it does.

An entry of `FAMILIES` is a claim about a model type. tests/test_architectures.py compares a small model of every one with
the untouched one: values, gradients and Hessian products, the dtype that it computes in, and its head.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from .imported import Config


class Family(NamedTuple):
    """What is known of one model type."""

    attention: Literal["causal", "encoder", "both", "none"] = "causal"
    """encoder: in both directions, unless it was made a decoder. both: an encoder and a decoder. none: states that run
    through the text, as they do where it has one token less."""
    window: Literal["none", "all layers", "by type"] = "none"
    """Which layers have the `sliding_window` of the configuration, if it has one: those whose type says so, or all.

    An encoder's window reaches as far to both sides, and as far as that number; a causal one counts the token itself.
    """
    packs: bool = True
    """Position ids that start again inside a row, without a mask, are sequences which do not see each other."""
    alibi: bool = False
    """Biases grow with the distance in tokens, which the model counts in the 2-D mask: it is passed on as it is.

    Where a configuration has `alibi`, only if that is true.
    """
    boolean: bool = False
    """Its layers are told of a mask where it is zero alone; the one in brief says which keys are padding, and no more."""
    counted: bool = False
    """Positions are counted in the 2-D mask where they are not given."""
    clean: bool = False
    """Computes in the dtype of its parameters; the others take norms or softmax in float32 whatever that is."""
    routed: bool = False
    """A router sends each token to some of the experts: a choice that is piecewise constant in the parameters."""
    linear_head: bool = True
    """The logits of the causal model are one linear map of the last hidden states, if none is capped by `config`."""


class Heads(NamedTuple):
    """How many heads share what: `num` queries, `num_kv` keys and values."""

    num: int
    num_kv: int
    model_type: str = ""

    @classmethod
    def of(cls, config: Config) -> Heads:
        """From a Hugging Face configuration. Raises ValueError where the two numbers are missing or do not divide."""
        num: Any = getattr(config, "num_attention_heads", None)
        num_kv: Any = getattr(config, "num_key_value_heads", None) or num
        if getattr(config, "new_decoder_architecture", False):
            num_kv = config.num_kv_heads
        elif getattr(config, "multi_query", False):
            num_kv = 1
        for name, value in (("num_attention_heads", num), ("num_key_value_heads", num_kv)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"`config` must have `{name}` of at least 1, got {value!r}: give the model's own configuration."
                )
        if num % num_kv:
            raise ValueError(
                f"`num_attention_heads` must be a multiple of `num_key_value_heads`, got {num} and {num_kv}."
            )
        return cls(num, num_kv, getattr(config, "model_type", ""))


FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers, as configurations name them."""

_CLAIMS = (
    (
        Family(),
        "apertus arcee codegen ernie4_5 gemma glm glm4 gpt_bigcode gpt_neo gpt_neox gptj helium hunyuan_v1_dense llama "
        "nemotron olmo olmo2 persimmon phi seed_oss stablelm",
    ),
    (Family(clean=True), "gpt2"),
    (Family(linear_head=False), "cohere granite"),
    (Family(window="by type"), "exaone4 gemma2 gemma3_text ministral olmo3 qwen2 qwen3 smollm3"),
    (Family(window="by type", linear_head=False), "cohere2"),
    (Family(window="all layers"), "ministral3 mistral phi3 starcoder2"),
    (Family(routed=True), "deepseek_v2 deepseek_v3 olmoe"),
    (Family(window="by type", routed=True), "qwen2_moe"),
    (Family(window="by type", packs=False, routed=True), "gpt_oss"),
    (Family(window="all layers", routed=True), "mixtral qwen3_moe"),
    (Family(packs=False, boolean=True), "mpt"),
    (Family(packs=False, clean=True), "biogpt"),
    (Family(packs=False, counted=True), "opt"),
    (Family(packs=False, alibi=True), "bloom"),
    (Family(alibi=True, clean=True), "falcon"),
    (
        Family("encoder", clean=True, linear_head=False),
        "albert bert camembert distilbert electra ernie roberta xlm-roberta",
    ),
    (Family("encoder", window="by type", linear_head=False), "modernbert"),
    (Family("none", packs=False, linear_head=False), "mamba mamba2"),
    (Family("both", linear_head=False), "t5"),
    (Family("both", clean=True, linear_head=False), "bart marian mbart pegasus whisper"),
)

FAMILIES: dict[str, Family] = {name: family for family, names in _CLAIMS for name in names.split()}


def family_of(config: Config) -> Family | None:
    """What is known of a model with this configuration; None where nothing is.

    >>> from transformers import GPT2Config, XLNetConfig
    >>> family_of(GPT2Config()).clean, family_of(XLNetConfig())
    (True, None)
    """
    family = FAMILIES.get(config.model_type)
    if family is None or (family.attention == "causal" and _sees_what_follows(config)):
        return None
    return family


def names() -> str:
    """The known model types, in the order of the alphabet.

    >>> names().startswith("albert, apertus, arcee, bart")
    True
    """
    return ", ".join(sorted(FAMILIES))


def computes_in_float32(config: Config) -> bool:
    """Are norms or softmax taken in float32 whatever the dtype of the parameters? True where it is not known."""
    family = family_of(config)
    return family is None or not family.clean


def has_linear_head(config: Config) -> bool:
    """Are the logits of the causal model one linear map of the last hidden states? False where it is not known."""
    family = family_of(config)
    return family is not None and family.linear_head and not getattr(config, "final_logit_softcapping", None)


def is_routed(config: Config) -> bool:
    """Is this a family whose tokens are sent to some of many experts? False where it is not known."""
    family = family_of(config)
    return family is not None and family.routed


def has_alibi(config: Config) -> bool:
    """Is the attention biased by distances that the model counts in the 2-D mask?"""
    family = family_of(config)
    return family is not None and family.alibi and getattr(config, "alibi", True)


def window(config: Config) -> tuple[int | None, bool]:
    """The length of the sliding window, None where no layer has one; and whether layers of both types are there."""
    family = family_of(config)
    kind = "none" if family is None else family.window
    types = set(getattr(config, "layer_types", None) or ()) if kind == "by type" else {SLIDING}
    if kind == "none" or SLIDING not in types:
        return None, False
    return config.sliding_window, len(types) > 1


def remedy(config: Config) -> str:
    """What can be had of a model whose masks are not known here."""
    if set(layer_types(config)) == {FULL, SLIDING}:
        return f"pass a mapping of two float masks of shape (batch, 1, tokens, tokens), {FULL!r} and {SLIDING!r}, or {_KEEP}"
    return _KEEP


def layer_types(config: Config) -> tuple[str, ...]:
    """The types of layers that a configuration names, each once."""
    return tuple(sorted(set(getattr(config.get_text_config(), "layer_types", None) or ())))


_KEEP = (
    'take `attention="keep"`, under which the model masks itself: values and gradients are right '
    "there, and `hessian_difference` up to the error of its step."
)


def _sees_what_follows(config: Config) -> bool:
    return getattr(config, "is_causal", True) is False or bool(getattr(config, "use_bidirectional_attention", False))
