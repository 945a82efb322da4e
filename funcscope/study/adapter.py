"""A folder with a low-rank adapter, as PEFT saves them: its settings, its model's folder, its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .folder import ADAPTER_CONFIG_NAME, json_object, local_folder
from .tensor_file import TensorFile

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDINGS = (".lora_A.weight", ".lora_B.weight")
_REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "layer_replication", "arrow_config",
    "target_parameters", "trainable_token_indices", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
"""Settings under which an adapter is something else than W + scale B A."""
_STARTS = ("gaussian", "orthogonal", "eva")
"""Ways of drawing B A at the start which leave the weights of the model as they are."""


class LowRank(NamedTuple):
    """W of one module becomes W + scale B A."""

    a: Tensor
    """(rank, inputs)."""
    b: Tensor
    """(outputs, rank)."""
    scale: float


class Adapter(NamedTuple):
    """What a folder says of its model's weights."""

    base: Path
    low_rank: Mapping[str, LowRank]
    """By the name of the module."""
    replaced: Mapping[str, Tensor]
    """Parameters that were trained as a whole."""


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / ADAPTER_CONFIG_NAME).is_file()


def read_adapter(folder: str | Path) -> Adapter:
    r"""The adapter in a local folder: $W + s\,B A$ for each of its modules.

    $s = \alpha / r$, or $\alpha / \sqrt r$ with `use_rslora`; ranks and $\alpha$ by module from `rank_pattern` and
    `alpha_pattern`. Raises FileNotFoundError where the model or the weights are not there, ValueError, by name, for an
    adapter of another kind, and for tensors that do not fit the settings.
    """
    path = local_folder(folder)
    settings = json_object(path / ADAPTER_CONFIG_NAME)
    _check_kind(path, settings)
    base, file = base_of(path), TensorFile(weights_of(path))
    low_rank = {module: _low_rank(path, file, module, settings) for module in _modules(path, file)}
    others = [name for name in file.tensors if not name.endswith(_ENDINGS)]
    if strange := [name for name in others if not name.startswith(_PREFIX) or ".lora_" in name]:
        raise ValueError(
            f"{path} holds `{strange[0]}`, which is no part of W + scale B A: merge it into its model (`merge_and_unload`)."
        )
    return Adapter(base, low_rank, {name.removeprefix(_PREFIX): file.read(name) for name in others})


def base_of(folder: str | Path) -> Path:
    """The folder of an adapter's model.

    `base_model_name_or_path` of its settings, as it is or within the adapter's folder; or one of that name beside the
    adapter. Raises FileNotFoundError where there is none: nothing is downloaded.
    """
    path = local_folder(folder)
    name = json_object(path / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{path / ADAPTER_CONFIG_NAME} does not say whose adapter it is: write the folder of that model into its "
            "`base_model_name_or_path`."
        )
    beside = path.resolve().parent / Path(name).name
    for place in (Path(name), path / name, beside):
        if place.is_dir() and place.resolve() != path.resolve():
            return place
    raise FileNotFoundError(
        f"{path} holds an adapter of {name!r}, and there is no such folder, nor one beside it: download that model to "
        f"{str(beside)!r} (nothing is downloaded here), or write its folder into `base_model_name_or_path` of "
        f"{ADAPTER_CONFIG_NAME}."
    )


def weights_of(path: Path) -> Path:
    """The file with an adapter's tensors. Raises FileNotFoundError where there is none; pickles are not read."""
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"{path} has no {WEIGHTS}: save the adapter again as safetensors (`save_pretrained`).")
    return path / WEIGHTS


def _check_kind(path: Path, settings: Mapping[str, Any]) -> None:
    merge = "merge it into its model (`merge_and_unload`) and pass the folder of that."
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"{path} holds an adapter of the kind {kind!r}, and only 'LORA' is read: {merge}")
    if used := [name for name in _REFUSED if settings.get(name)]:
        raise ValueError(f"the adapter in {path} has `{used[0]}`, so that it is not W + scale B A: {merge}")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and not start.startswith(_STARTS):
        raise ValueError(
            f"the adapter in {path} was started by {start!r}, which changes the weights of the model as well, and these are "
            f"not in the folder: {merge}"
        )


def _modules(path: Path, file: TensorFile) -> Iterator[str]:
    """Every module with an A, each of which must have a B."""
    parts = {
        ending: {name.removesuffix(ending) for name in file.tensors if name.endswith(ending)} for ending in _ENDINGS
    }
    first, second = parts.values()
    if not first and not second:
        raise ValueError(f"{path / WEIGHTS} holds no `lora_A` and `lora_B`: it is no low-rank adapter.")
    if odd := sorted(first ^ second):
        raise ValueError(f"{path / WEIGHTS} holds one of `lora_A` and `lora_B` of {odd[0]}: the file is incomplete.")
    for name in sorted(first):
        if not name.startswith(_PREFIX):
            raise ValueError(
                f"{path / WEIGHTS} holds `{name}`, whose name does not begin with {_PREFIX!r}, as PEFT's do."
            )
        yield name.removeprefix(_PREFIX)


def _low_rank(path: Path, file: TensorFile, module: str, settings: Mapping[str, Any]) -> LowRank:
    a, b = (file.read(f"{_PREFIX}{module}{ending}") for ending in _ENDINGS)
    rank = _of_pattern(settings.get("rank_pattern"), module, settings.get("r"))
    alpha = _of_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha"))
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
        raise ValueError(
            f"the adapter of `{module}` in {path} has tensors of shapes {tuple(b.shape)} and {tuple(a.shape)}, and its "
            f"settings say rank {rank}: they belong to different adapters."
        )
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"`lora_alpha` of {path / ADAPTER_CONFIG_NAME} must be a number, got {alpha!r}.")
    return LowRank(a, b, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, usual: Any) -> Any:
    """The value of the first pattern that is the end of the name, from a dot on; the usual one where none is."""
    for key, value in (patterns or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", module)
        except re.error as err:
            raise ValueError(
                f"{key!r} in the `rank_pattern` or `alpha_pattern` of an adapter is no pattern ({err})."
            ) from err
        if found:
            return value
    return usual
