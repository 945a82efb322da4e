"""The configuration of a study: the documented fields, from arguments, a file, the environment, the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..core.checks import check_choice, check_count, check_positive
from ..core.keys import Stream
from ..core.model import Attention
from ..families.family import SPLITS
from .catalogue import CATALOGUE, metric
from .cluster import address_of
from .fields import check_kind, stored_values
from .flags import FLAGS, LONG, OF_TASKS, asked_by
from .meter import Options
from .metric import Metric, nearest
from .texts import DataSpec, Usual


@dataclass
class UnifiedConfig:
    """What `analyze_models` does: the documented fields with their documented values, and ours at the end.

    `fisher_batch_size`, `batch_size`, `max_batch_size` and the sizes by grid are how many sequences are in memory at a time,
    and change no number. `dataset_name` is a file of texts, a Hugging Face data set of which `dataset_split` is read, or
    several by name: every model is then measured on each, as "MODEL on NAME", and on every two together, as "MODEL on ONE and
    OTHER" (`enable_qkov_interference`, also known as `compute_qkov`, and `enable_cross_task_conflicts` say whether heads and
    conflicts are among what `compute_fisher` asks for there, `compute_fisher_eigenvalues` whether methods are compared).
    `model_name` is the model where no path is passed, `base_model` the one that pairs compare the others with, and that the
    models of `compute_bombshell` were fine-tuned from, each on the data set that has the name of its folder. Raises TypeError
    for an unknown field, ValueError for one of the wrong kind.
    """

    model_name: str | None = None
    base_model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    dataset_name: str | Mapping[str, str] = "openwebtext"
    dataset_split: str = "train"
    num_samples: int = 1000
    max_seq_length: int = Usual(512)  # or as many as the model has positions
    batch_size: int = 32
    max_batch_size: int = 256
    min_batch_size: int = 4
    adaptive_batch_sizing: bool = True
    compute_all: bool = False
    compute_fisher: bool = False
    compute_gradients: bool = False
    compute_information_theory: bool = False
    compute_representations: bool = False
    compute_mechanistic: bool = False
    compute_modularity: bool = False
    compute_lottery: bool = False
    compute_bombshell: bool = False
    compute_loss_landscape: bool = False
    fisher_n_samples: int = 1000
    fisher_method: str = "empirical"
    fisher_batch_size: int = 128
    compute_fisher_eigenvalues: bool = True
    fisher_top_k: int = 20
    enable_qkov_interference: bool = True
    enable_cross_task_conflicts: bool = True
    loss_landscape_n_points: int = 25
    loss_landscape_span: float | int = 0.1
    loss_landscape_normalization: str = "layer"
    loss_landscape_batches: int = 10
    gradient_trajectory_steps: int = 100
    compute_gradient_flow: bool = True
    compute_gradient_pathology: bool = True
    aggressive_cleanup: bool = True
    enable_memory_tracking: bool = False
    max_memory_gb: float | int = 70.0
    seed: int = 42
    deterministic: bool = True
    output_dir: str = "./analysis_results"
    save_results: bool = True
    save_plots: bool = False
    verbose: bool = True
    use_cache: bool = True
    force_recompute: bool = False
    skip_on_error: bool = True
    timeout_seconds: float | int | None = None
    metrics: tuple[str, ...] = ()
    """Metrics of the catalogue by name, beside those of the flags."""
    settings: Mapping[str, Mapping[str, Any]] | None = None
    """By metric, settings that have no field here: `{"sam_sharpness": {"epsilon": 0.05}}`."""
    task: str | None = None
    """`causal`, `masked`, `classification` or `seq2seq`; None reads it from each model."""
    field: str = "text"
    """The field or column of a text."""
    label_field: str | None = None
    """That of its class."""
    second_field: str | None = None
    """That of a second text: the other one of a pair for classifiers, what an encoder-decoder is to say."""
    unit: str = "paragraph"
    """What one text of a .txt file is: a line, a paragraph, the document."""
    packing: bool = False
    """Cut the joined texts into full blocks, without padding."""
    attention: str = "auto"
    """The kernel: `eager`, `blocks` of queries, `auto` for these where texts are long, `math`, or `keep`, the model's own."""
    remat: str = "none"
    """`layer`: layers are computed again in derivatives, at less memory and more time."""
    trainable: str = "all"
    """`adapter`: the parameters of a low-rank adapter alone; `all`: it is merged into its model."""
    compute_dtype: str = "auto"
    """Weights are cast to it where they are used."""
    allow_pickle: bool = False
    """Read pytorch_model.bin too, as tensors only."""
    split: str = "train"
    """Of the checkpoints of a family, whose data are its own: `train`, `test` or `probe`."""
    stream: str = "cpu"
    """`device`: random numbers are made on the device of the weights; the normal ones are another stream than the CPU's."""
    compute_qkov: bool | None = None
    hard_timeout: bool = False
    """Run every metric in a process of its own, which is killed when `timeout_seconds` are over, whatever it does."""
    workers: int = 1
    """Models or checkpoints at a time, each in a process of its own."""
    executor: str | None = None
    """Who measures: `dask`, with as many `workers` on this machine, or the workers of a scheduler, `dask:tcp://HOST:8786`."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if not (each.name == "dataset_name" and isinstance(self.dataset_name, Mapping)):
                check_kind(each.name, getattr(self, each.name), each.default)
        for name in (
            "num_samples",
            "max_seq_length",
            "batch_size",
            "max_batch_size",
            "min_batch_size",
            "fisher_n_samples",
            "workers",
        ):
            check_count(name, getattr(self, name))
        check_positive("max_memory_gb", self.max_memory_gb)
        check_choice("fisher_method", self.fisher_method, ("empirical", "exact"))
        check_choice("split", self.split, SPLITS)
        check_choice("attention", self.attention, get_args(Attention))
        check_choice("remat", self.remat, ("none", "layer"))
        check_choice("stream", self.stream, get_args(Stream))
        if self.executor is not None:
            address_of(self.executor, num=self.workers)
        if self.compute_qkov is not None:
            self.enable_qkov_interference = self.compute_qkov

    @classmethod
    def load(cls, path: str | Path | None = None, **changes: Any) -> UnifiedConfig:
        """From the environment (`FUNCSCOPE_SEED=7`), then a `.json` or `.toml` file, then `changes`: what is later counts.

        Raises ValueError for a field that there is not, with the nearest there is.
        """
        return cls.of({**stored_values(path), **changes})

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> UnifiedConfig:
        """From a mapping of fields."""
        known = [each.name for each in fields(cls)]
        for name in values.keys() - set(known):
            raise ValueError(f"the configuration has a field {name!r}, which there is not{nearest(name, known)}")
        chosen: dict[str, Any] = {name: tuple(v) if name == "metrics" else v for name, v in values.items()}
        return cls(**chosen)

    def selected(self) -> list[Metric]:
        """The metrics that are asked for, with their settings.

        Raises ValueError where nothing is asked for, or nothing that a flag asks for is there.
        """
        names = list(self.metrics)
        if self.compute_all:
            kinds = ("model", *(OF_TASKS if self._has_tasks else ()))
            names += [name for name, one in CATALOGUE.items() if one.on in kinds and name not in LONG]
        for flag in FLAGS:
            if getattr(self, flag):
                names += self.asked_by(flag)
        if not names:
            raise ValueError(
                "no metric is asked for: `metrics=(...)`, `compute_all=True`, or a flag such as `compute_fisher`."
            )
        for name in self.settings or {}:
            self.configured(name)  # refuses a setting that it does not have
            if name not in names:
                raise ValueError(f"there are settings of {name}, which is not measured: add it to `metrics`.")
        return [self.configured(name) for name in dict.fromkeys(names)]

    @property
    def _has_tasks(self) -> bool:
        """Whether there are several data sets to be looked at together."""
        return isinstance(self.dataset_name, Mapping) and len(self.dataset_name) > 1

    def asked_by(self, flag: str) -> list[str]:
        """The metrics of a flag; those of several data sets where there are several.

        Raises ValueError where none is left.
        """
        off = {
            "cross_task_conflicts": not self.enable_cross_task_conflicts,
            "qkov_interference": not self.enable_qkov_interference,
            "fisher_methods": not self.compute_fisher_eigenvalues,
            "gradient_flow": not self.compute_gradient_flow,
            "gradient_pathology": not self.compute_gradient_pathology,
        }
        return asked_by(flag, off=[name for name, is_off in off.items() if is_off], has_tasks=self._has_tasks)

    def configured(self, name: str) -> Metric:
        """A metric with the settings that this configuration has for it."""
        own: dict[str, tuple[str | None, dict[str, Any]]] = {
            "fisher_information": ("fisher", {"method": self.fisher_method, "num": self.fisher_top_k}),
            **{
                name: ("fisher", {})
                for name in (
                    "fisher_importance",
                    "fisher_methods",
                    "fisher_overlap",
                    "cross_task_conflicts",
                    "qkov_interference",
                )
            },
            "gradient_trajectory": (None, {"steps": self.gradient_trajectory_steps}),
            "loss_landscape_2d": (
                "landscape",
                {
                    "n_points": self.loss_landscape_n_points,
                    "span": self.loss_landscape_span,
                    "normalization": self.loss_landscape_normalization,
                },
            ),
        }
        task, settings = own.get(name, (None, {}))
        return metric(name).configured(**{"task": task, **settings, **dict((self.settings or {}).get(name, {}))})

    def tasks(self) -> dict[str, DataSpec]:
        """The data: all, as many as the Fisher information takes, and the batches of the landscape."""
        data = DataSpec(
            data=str(self.dataset_name),
            field=self.field,
            label_field=self.label_field,
            second_field=self.second_field,
            unit=self.unit,  # type: ignore[arg-type]
            task=self.task,  # type: ignore[arg-type]
            num_samples=self.num_samples,
            max_seq_length=None if isinstance(self.max_seq_length, Usual) else self.max_seq_length,
            batch_size=min(self.batch_size, self.max_batch_size),
            packing=self.packing,
            split=self.dataset_split,
            seed=self.seed,
            dtype=self.dtype,  # type: ignore[arg-type]
            compute_dtype=self.compute_dtype,  # type: ignore[arg-type]
            attention=self.attention,  # type: ignore[arg-type]
            remat=self.remat,  # type: ignore[arg-type]
            trainable=self.trainable,  # type: ignore[arg-type]
            device=("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device,
            allow_pickle=self.allow_pickle,
        )
        num = min(self.num_samples, self.loss_landscape_batches * self.batch_size)
        grid = 32 if self.loss_landscape_n_points <= 19 else 16 if self.loss_landscape_n_points <= 25 else 8
        return {
            "data": data,
            "fisher": replace(data, num_samples=self.fisher_n_samples, batch_size=min(self.fisher_batch_size, 256)),
            "landscape": replace(data, num_samples=num, batch_size=min(grid, data.batch_size)),
        }

    def options(self) -> Options:
        return Options(
            seed=self.seed,
            stream=self.stream,  # type: ignore[arg-type]
            force=self.force_recompute or not self.use_cache,
            skip_on_error=self.skip_on_error,
            timeout_seconds=None if self.timeout_seconds is None else float(self.timeout_seconds),
            min_batch_size=self.min_batch_size if self.adaptive_batch_sizing else 2**62,
            max_memory_gb=float(self.max_memory_gb),
            cleanup=self.aggressive_cleanup,
            deterministic=self.deterministic,
            hard_timeout=self.hard_timeout,
            log_memory=self.enable_memory_tracking and self.verbose,
        )
