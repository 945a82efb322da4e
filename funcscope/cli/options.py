"""Options of the commands, made from what they set: fields of the configuration and settings of metrics."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ..study.catalogue import CATALOGUE
from ..study.config import UnifiedConfig
from ..study.fields import parsed
from ..study.metric import nearest

TEXTS = {
    "field": "field or column that holds the text",
    "label_field": "field or column that holds the class",
    "second_field": "that of a second text: of a pair, or what an encoder-decoder is to say",
    "dataset_split": "of a Hugging Face data set",
    "unit": "what one text of a .txt file is: line, paragraph, document",
    "task": "what the model is trained for, if config.json does not say: causal, masked, classification, seq2seq, "
    "image_classification, speech",
    "num_samples": "texts that are scored",
    "max_seq_length": "tokens kept of each; at most as many as the model has positions",
    "batch_size": "texts per forward pass; changes no number",
    "packing": "cut the joined texts into full blocks, without padding",
}
COMPUTING = {
    "seed": "of every draw",
    "dtype": "of the weights; auto: as stored",
    "compute_dtype": "weights are cast to it where they are used",
    "attention": "the kernel: eager, blocks (of queries), auto (those for long texts), math, or keep for the model's own",
    "remat": "layer: compute layers again in derivatives, at less memory and more time; none",
    "trainable": "adapter: the parameters of a low-rank adapter alone; all: it is merged into its model",
    "device": "cpu, cuda, cuda:1, mps; auto: a GPU where there is one",
    "timeout_seconds": "for one metric on one model",
    "max_memory_gb": "of the process or the GPU; a metric that needs more is made with less at a time, then ends",
    "allow_pickle": "also read pytorch_model.bin, as tensors only",
}
STREAM = {
    "stream": "of random numbers. cpu: the same bits on every device; device: made there, the normal ones are others"
}
"""Of commands whose draws are random directions and probes."""

_WORDS = ("label_field", "second_field", "task")


class Flag(NamedTuple):
    """An option that is a setting of one metric, or of several that have it in common."""

    settings: Sequence[str]
    """As `metric.setting`; the first says the default and the kind."""
    help: str

    @property
    def default(self) -> Any:
        metric, _, name = self.settings[0].partition(".")
        return {**CATALOGUE[metric].settings, **CATALOGUE[metric].plan}[name]

    @property
    def choices(self) -> tuple[Any, ...] | None:
        metric, _, name = self.settings[0].partition(".")
        hint = get_type_hints(inspect.unwrap(CATALOGUE[metric].call)).get(name)
        return get_args(hint) if get_origin(hint) is Literal else None


def add_fields(parser: Any, names: Mapping[str, str], defaults: Mapping[str, Any]) -> None:
    """Options for fields of `UnifiedConfig`, with their own defaults unless others are given; not said is not set."""
    known = {each.name: each for each in fields(UnifiedConfig)}
    for name, text in names.items():
        value = defaults.get(name, known[name].default)
        _add(parser, name, f"{text}{_shown(value)}", value)


def add_flags(parser: Any, flags: Mapping[str, Flag], defaults: Mapping[str, Mapping[str, Any]]) -> None:
    """Options for settings of metrics."""
    for name, flag in flags.items():
        metric, _, setting = flag.settings[0].partition(".")
        value = defaults.get(metric, {}).get(setting, flag.default)
        _add(parser, name, f"{flag.help}{_shown(value)}", value, flag.choices)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """`--set`, for whatever has no option of its own."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
        help="a field of the configuration, or metric.setting=value as in `funcscope metrics`",
    )  # fmt: skip


def changed(args: argparse.Namespace, flags: Mapping[str, Flag]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What was said on the command line: fields, and settings by metric."""
    known = {each.name for each in fields(UnifiedConfig)}
    given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    settings: dict[str, dict[str, Any]] = {}
    for name, flag in flags.items():
        if (value := getattr(args, name, None)) is not None:
            for target in flag.settings:
                metric, _, setting = target.partition(".")
                settings.setdefault(metric, {})[setting] = value
    for text in getattr(args, "changes", ()):
        name, equals, value = text.partition("=")
        metric, dot, setting = name.partition(".")
        if not equals:
            raise ValueError(f"`--set` takes name=value or metric.setting=value, got {text!r}.")
        if name == "metrics":
            raise ValueError(
                f"`--set {text}` does not choose what is measured: `funcscope analyze MODEL --metrics NAME ...` does."
            )
        if not dot:
            given[name] = parsed(value)
        elif metric in CATALOGUE:
            settings.setdefault(metric, {})[setting] = parsed(value)
        else:
            raise ValueError(f"no metric {metric!r}{nearest(metric, CATALOGUE)}")
    return given, settings


def _add(parser: Any, name: str, text: str, value: Any, choices: Sequence[Any] | None = None) -> None:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    kind: Any = str if isinstance(value, str) or name in _WORDS else parsed
    if isinstance(value, (int, float)):
        kind = int if isinstance(value, int) else float
    parser.add_argument(flag, type=kind, default=None, choices=choices, metavar=None if choices else "X", help=text)


def _shown(value: Any) -> str:
    return "" if value is None else f" (default: {'yes' if value is True else 'no' if value is False else value})"


def with_flags(text: str, options: Collection[str], flags: Mapping[str, Flag] = {}, metric: str = "") -> str:
    """Python's words in backticks by what this command calls them: an option with its value, or what `--set` takes.

    flags: the command's options for settings. metric: the one that says it, whose settings are meant.

    >>> with_flags('pass `seed=3`, `packing=False` or `attention="keep"`', ["seed", "packing", "attention"])
    'pass `--seed 3`, `--no-packing` or `--attention keep`'
    >>> with_flags("`head_chunk` needs `keep=True`", ["changes"], metric="hessian_trace")
    '`--set hessian_trace.head_chunk` needs `--set hessian_trace.keep=true`'
    """
    named = {name: f"--{name.replace('_', '-')}" for name in options if name not in _NO_OPTIONS}
    named |= {name: f"--{flag}" for name, flag in _OTHERWISE.items() if flag in options or name in options}
    if "changes" in options:
        named = {each.name: f"--set {each.name}" for each in fields(UnifiedConfig)} | named
    if metric in CATALOGUE:
        named |= _of_settings(metric, flags, is_set="changes" in options)

    def said(word: re.Match[str]) -> str:
        name, value = word[1], word[2]
        return f"`{_with_value(named[name], value)}`" if name in named else word[0]

    return re.sub(r"`(\w+)(?:=([^`]+))?`(?: (?:in|to) `functional`)?", said, text)


def _of_settings(metric: str, flags: Mapping[str, Flag], *, is_set: bool) -> dict[str, str]:
    """What sets each setting of a metric: an option of the command, or `--set`."""
    known = {**CATALOGUE[metric].settings, **CATALOGUE[metric].plan}
    own = {name: f"--set {metric}.{name}" for name in known} if is_set else {}
    targets = {target: f"--{name.replace('_', '-')}" for name, flag in flags.items() for target in flag.settings}
    return own | {name: targets[f"{metric}.{name}"] for name in known if f"{metric}.{name}" in targets}


def _with_value(flag: str, value: str | None) -> str:
    """As it is typed; Python's text, dictionary or dtype as the command line takes it."""
    is_set, word = flag.startswith("--set "), (value or "").strip("'\"").removeprefix("torch.")
    if word in ("True", "False") and not is_set:
        return flag if word == "True" else flag.replace("--", "--no-", 1)
    if word.startswith("{"):
        word = " ".join(f"{name}={one}" for name, one in ast.literal_eval(word).items())
    if word in ("True", "False", "None"):
        word = {"True": "true", "False": "false", "None": "null"}[word]
    return f"{flag}{'=' if is_set else ' '}{word}" if word else flag


_OTHERWISE = {"n_samples": "samples", "dataset_name": "data", "output_dir": "out"}
_NO_OPTIONS = ("run", "changes", "model", "models", "a", "b", "folder", "family", "variant")
