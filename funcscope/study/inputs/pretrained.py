"""Models and tokenizers from local Hugging Face folders: nothing is downloaded, and no code of theirs is run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, get_args

import torch
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperConfig,
)
from transformers import __version__ as transformers_version

from ...core.checks import check_choice
from ..adapter import base_of, is_adapter, read_adapter
from ..folder import json_object, local_folder, settings, stored_dtype, weight_files
from ..quiet import TURNS, one_line, quiet
from ..texts import DType, Task
from .adapted import Trainable, adapt
from .tokens import embedding_rows

_BY_CLASS: tuple[tuple[str, Task], ...] = (
    ("ForCausalLM", "causal"),
    ("LMHeadModel", "causal"),
    ("ForMaskedLM", "masked"),
    ("ForSequenceClassification", "classification"),
    ("ForImageClassification", "image_classification"),
    ("WhisperForConditionalGeneration", "speech"),
    ("ForConditionalGeneration", "seq2seq"),
)
_AUTO: dict[Task, tuple[Any, Any]] = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "masked": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    "classification": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "seq2seq": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    "image_classification": (AutoModelForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
    "speech": (AutoModelForSpeechSeq2Seq, {WhisperConfig}),  # others take other inputs
}
_VOCABULARY = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model",
)  # fmt: skip


PROBE = "Two words, 3 numbers (12, 1234) and a line.\n    x = y_0 + 1\tTab's end"
"""A text on which tokenizers that split differently differ."""


def load_model(
    folder: str | Path,
    *,
    task: Task | None = None,
    dtype: DType = "auto",
    allow_pickle: bool = False,
    trainable: Trainable = "all",
) -> PreTrainedModel:
    """The model of a local Hugging Face folder, on the CPU and in eval mode.

    task: what it is trained for; None reads it from the architecture in `config.json`.
    dtype: "auto" keeps the dtype that the weights are stored in (the widest, where there are several).
    allow_pickle: also read `pytorch_model.bin`, as tensors only; otherwise weights are safetensors, whole or in shards.
    trainable: of a folder with a low-rank adapter (PEFT's LoRA): `all` merges it into its model, which is found by its
    settings (`adapter.base_of`); with `adapter` it stays beside the weights, and its own parameters alone have
    `requires_grad`.

    Weights that keep their dtype are mapped from their files, so that they occupy memory once, when they are first
    used. While the model is in use its files must not be overwritten in place; to replace them, as `save_pretrained`
    does, is safe. Tensors of the folder that belong to a head of another task are left out. The global random generator
    is not used.

    Raises FileNotFoundError, NotADirectoryError or ValueError, in one line, for a folder that holds no such model, or
    a damaged or incomplete one: no weight is ever made up.
    """
    check_choice("dtype", dtype, get_args(DType))
    if task is not None:
        check_choice("task", task, get_args(Task))
    path = local_folder(folder)
    if is_adapter(path):
        adapter = read_adapter(path)
        model = load_model(adapter.base, task=task, dtype=dtype, allow_pickle=allow_pickle)
        return adapt(model, adapter, path, trainable).eval()
    if trainable == "adapter":
        raise ValueError(f"{path} holds no adapter (adapter_config.json): pass one, or `trainable='all'`.")
    config = _config(path)
    task = _task(path, config, task)
    files = weight_files(path, allow_pickle=allow_pickle)
    chosen = stored_dtype(files) if dtype == "auto" else getattr(torch, dtype)
    with (
        TURNS.loading(chosen),
        quiet(),
        torch.random.fork_rng(devices=[]),
        one_line(f"the model in {path} cannot be loaded"),
    ):
        model, report = _AUTO[task][0].from_pretrained(
            path,
            config=config,
            dtype=chosen,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=files[0].suffix == ".safetensors",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_complete(path, model, report)
    return model.eval()


def task_of(model: PreTrainedModel) -> Task:
    """The task that the class of a model stands for, `...ForMaskedLM` for example; ValueError where it says none."""
    name = type(model).__name__
    if (task := _named(name)) is None:
        raise ValueError(f"a {name} has none of the tasks {_choices()}: load the model with `load_model`.")
    return task


def load_tokenizer(folder: str | Path, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a local Hugging Face folder, for this model.

    Raises FileNotFoundError, NotADirectoryError or ValueError, in one line, for a folder without a tokenizer, a
    damaged one, one that is made by code of its own, and one with more tokens than the model has embeddings. Warns where
    transformers makes other tokens of a text than the folder's tokenizer.json says.
    """
    path = local_folder(folder)
    if is_adapter(path) and not any((path / name).is_file() for name in _VOCABULARY):
        path = base_of(path)
    _check_vocabulary(path)
    with quiet(), one_line(f"the tokenizer in {path} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(
            path, config=model.config, local_files_only=True, trust_remote_code=False
        )
    rows = embedding_rows(model)
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens, the model's input embedding {rows} rows: it is another "
            f"model's tokenizer, or the embedding must grow with `model.resize_token_embeddings({len(tokenizer)})`."
        )
    _warn_if_reread(path, tokenizer)
    return tokenizer


def _warn_if_reread(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """For some families transformers takes the vocabulary of tokenizer.json, and splits text in a way of its own."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return
    with one_line(f"the tokenizer in {path} cannot be loaded"):
        stored = Tokenizer.from_file(str(file))
    stored.no_truncation()
    stored.no_padding()
    ours = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    if ours != stored.encode(PROBE, add_special_tokens=False).ids:
        warnings.warn(
            f"transformers reads the tokenizer in {path} as a {type(tokenizer).__name__}, which makes other tokens of a text "
            "than its tokenizer.json says. If the model was trained with that file, the losses are those of garbled text.",
            stacklevel=3,
        )


def _config(path: Path) -> PreTrainedConfig:
    content = settings(path)
    family = content.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        if "auto_map" in content:
            raise ValueError(
                f"the model in {path} is made by code of its own (`auto_map`), which is not run: "
                "only the families that transformers itself has are read."
            )
        raise ValueError(
            f"{path / 'config.json'} has the model type {family!r}, which transformers {transformers_version} does not "
            "know: check `model_type`, or install a transformers that has it."
        )
    with quiet(), one_line(f"{path / 'config.json'} has settings that cannot be"):
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _task(path: Path, config: PreTrainedConfig, given: Task | None) -> Task:
    """The task, after all that can be said about it before weights are read."""
    architecture = next(iter(config.architectures or ()), None)
    possible = [name for name, (_, mapping) in _AUTO.items() if type(config) in mapping]
    if not possible:
        raise ValueError(
            f"{path} holds a {architecture or config.model_type}, which has none of the tasks {_choices()}: score it from "
            "Python, where `fs.objective(fs.functional(model), batches, criterion)` takes whatever the model takes."
        )
    named = _named(architecture or "")
    if (task := given or named) is None:
        raise ValueError(
            f"{path} holds a {architecture or config.model_type}, which says no task: pass `task`, one of "
            f"{', '.join(map(repr, possible))}."
        )
    if given and named and given != named:
        raise ValueError(f"`task` is {given!r}, and {path} holds a {architecture}: pass {named!r}, or another folder.")
    _check_task(path, config, task)
    return task


def _check_task(path: Path, config: PreTrainedConfig, task: Task) -> None:
    if type(config) not in _AUTO[task][1]:
        raise ValueError(
            f"{path} holds a {config.model_type} model, and transformers has none of those for {task!r}: pass "
            "another task, or study it from Python (`fs.functional`)."
        )
    either = type(config) in _AUTO["masked"][1]  # of the others, some have the attribute and never read it
    if task == "causal" and either and not getattr(config, "is_decoder", True):
        raise ValueError(
            f"the attention of the {config.model_type} model in {path} sees the tokens that a causal model predicts: "
            "`is_decoder` is false in its config.json. Pass a decoder, or the task 'masked'."
        )
    if task in ("classification", "image_classification") and (
        config.num_labels < 2 or config.problem_type not in (None, "single_label_classification")
    ):
        raise ValueError(
            f"the classifier in {path} must choose one of two or more classes, it has {config.num_labels} "
            f"(problem_type {config.problem_type!r}): score it in Python with `fs.custom`."
        )


def _named(architecture: str) -> Task | None:
    return next((task for ending, task in _BY_CLASS if architecture.endswith(ending)), None)


def _choices() -> str:
    return ", ".join(map(repr, get_args(Task)))


def _check_complete(path: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Nothing was made up, and nothing that the settings leave out: transformers would only log it."""
    name = type(model).__name__
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{path} lacks {len(missing)} of the weights of a {name}, which would be random numbers: {_first(missing)}. "
            "Pass a complete checkpoint of that kind."
        )
    if mismatched := sorted(report["mismatched_keys"]):
        shapes = [f"{key} {tuple(stored)} for {tuple(wanted)}" for key, stored, wanted in mismatched]
        raise ValueError(
            f"weights in {path} have another shape than its config.json says ({len(shapes)} in all): {_first(shapes)}."
        )
    wanted = {_pattern(key) for key in model.state_dict()}
    if more := sorted(key for key in report["unexpected_keys"] if _pattern(key) in wanted):
        raise ValueError(
            f"weights in {path} belong to layers that its config.json leaves out ({len(more)} in all): {_first(more)}."
        )


def _pattern(key: str) -> str:
    """The name of a weight whatever the layer."""
    return re.sub(r"\d+", "#", key)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_vocabulary(path: Path) -> None:
    """Without these files transformers makes a tokenizer of one token for some families, and says nothing."""
    present = {name for name in _VOCABULARY if (path / name).is_file()}
    if not present:
        raise FileNotFoundError(
            f"{path} has no tokenizer: tokenizer.json or a vocabulary is looked for. Save the tokenizer there with "
            "`save_pretrained`, or pass the folder that has it."
        )
    if present == {"vocab.json"} and not (path / "merges.txt").is_file():
        raise FileNotFoundError(
            f"{path} has the vocab.json of a tokenizer without its merges.txt: copy that there too."
        )
    if "tokenizer.json" in present:
        json_object(path / "tokenizer.json")
    file = path / "tokenizer_config.json"
    if file.is_file() and "auto_map" in json_object(file) and "tokenizer.json" not in present:
        raise ValueError(f"the tokenizer in {path} is made by code of its own (`auto_map`), which is not run.")
