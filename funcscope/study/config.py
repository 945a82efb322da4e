"""`analyze_models(model_paths, config)`: the documented entry point, over the catalogue and the engine."""

from __future__ import annotations

import json
import re
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..core.checks import check_choice, check_count, check_positive
from .cache import Cache
from .catalogue import CATALOGUE, metric
from .engine import run
from .meter import Options
from .metric import Metric, nearest
from .opening import DataSpec
from .results import Results
from .subject import Pretrained, Source

FLAGS: dict[str, tuple[str, ...]] = {
    "compute_fisher": ("fisher_information", "fisher_importance", "fisher_overlap"),
    "compute_gradients": ("gradient_flow", "gradient_pathology"),
    "compute_information_theory": ("mutual_information", "entropy", "pid_analysis"),
    "compute_representations": ("dead_neurons", "superposition", "feature_geometry"),
    "compute_mechanistic": ("attention_patterns", "induction_heads", "qk_ov_circuits"),
    "compute_modularity": ("modularity_score", "separability", "task_interference"),
    "compute_lottery": ("pruning_robustness", "winning_tickets"),
    "compute_bombshell": ("task_vectors", "ties_merging", "fisher_merging"),
    "compute_loss_landscape": ("loss_landscape_2d",),
}
"""By flag, the documented names of the metrics that it asks for."""
STEP = re.compile(r"(?:^|[-_/])(?:checkpoint|step|global_step)[-_]?(\d+)$")


@dataclass
class UnifiedConfig:
    """What `analyze_models` does: the documented fields with their documented values, and five of ours at the end.

    `fisher_batch_size`, `batch_size`, `max_batch_size` and the sizes by grid are how many sequences are in memory at a time,
    and change no number. Without effect so far, beside the fields of metrics that are not here: `model_name`, `base_model`,
    `dataset_split` (texts are a file), `save_plots` (`funcscope.view.report.write_report` makes the page). Raises TypeError
    for an unknown field, ValueError for one of the wrong kind.
    """

    model_name: str | None = None
    base_model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    dataset_name: str = "openwebtext"
    dataset_split: str = "train"
    num_samples: int = 1000
    max_seq_length: int = 512
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
    loss_landscape_span: float = 0.1
    loss_landscape_normalization: str = "layer"
    loss_landscape_batches: int = 10
    gradient_trajectory_steps: int = 100
    compute_gradient_flow: bool = True
    compute_gradient_pathology: bool = True
    aggressive_cleanup: bool = True
    enable_memory_tracking: bool = False
    max_memory_gb: float = 70.0
    seed: int = 42
    deterministic: bool = True
    output_dir: str = "./analysis_results"
    save_results: bool = True
    save_plots: bool = False
    verbose: bool = True
    use_cache: bool = True
    force_recompute: bool = False
    skip_on_error: bool = True
    timeout_seconds: float | None = None
    metrics: tuple[str, ...] = ()
    """Metrics of the catalogue by name, beside those of the flags."""
    settings: Mapping[str, Mapping[str, Any]] | None = None
    """By metric, settings that have no field here: `{"sam_sharpness": {"epsilon": 0.05}}`."""
    task: str | None = None
    """`causal`, `masked` or `classification`; None reads it from each model."""
    field: str = "text"
    label_field: str | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            check_kind(each.name, getattr(self, each.name), each.default)
        for name in (
            "num_samples",
            "max_seq_length",
            "batch_size",
            "max_batch_size",
            "min_batch_size",
            "fisher_n_samples",
        ):
            check_count(name, getattr(self, name))
        check_positive("max_memory_gb", self.max_memory_gb)
        check_choice("fisher_method", self.fisher_method, ("empirical", "exact"))

    @classmethod
    def load(cls, path: str | Path) -> UnifiedConfig:
        """From a `.json` or `.toml` file. Raises ValueError for a field that there is not, with the nearest there is."""
        text = Path(path).read_text(encoding="utf-8")
        return cls.of(tomllib.loads(text) if Path(path).suffix == ".toml" else json.loads(text))

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
            names += [name for name, one in CATALOGUE.items() if not {"pair", "series"} & {*one.needs}]
        for flag in FLAGS:
            if getattr(self, flag):
                names += self.asked_by(flag)
        if not names:
            raise ValueError(
                "no metric is asked for: `metrics=(...)`, `compute_all=True`, or a flag such as `compute_fisher`."
            )
        for name, changes in (self.settings or {}).items():
            metric(name).configured(**changes)  # refuses a setting that it does not have
            if name not in names:
                raise ValueError(f"there are settings of {name}, which is not measured: add it to `metrics`.")
        return [self.configured(name) for name in dict.fromkeys(names)]

    @staticmethod
    def asked_by(flag: str) -> list[str]:
        """The metrics of a flag that are there. Raises ValueError where none is, warns where some are not."""
        wanted = FLAGS[flag]
        there = [name for name in wanted if name in CATALOGUE]
        if not there:
            raise ValueError(
                f"`{flag}` asks for {', '.join(wanted)}, which are not here yet: "
                f"there are {', '.join(sorted(CATALOGUE))}."
            )
        if absent := [name for name in wanted if name not in CATALOGUE]:
            warnings.warn(f"`{flag}`: {', '.join(absent)} are not here yet, and left out.", stacklevel=4)
        return there

    def configured(self, name: str) -> Metric:
        """A metric with the settings that this configuration has for it."""
        own = {
            "fisher_information": ("fisher", {"method": self.fisher_method, "num": self.fisher_top_k}),
            "loss_landscape_2d": (
                "landscape",
                {
                    "n_points": self.loss_landscape_n_points,
                    "span": self.loss_landscape_span,
                    "normalization": self.loss_landscape_normalization,
                },
            ),
        }
        task, settings = own.get(name, ("data", {}))
        return metric(name).configured(task=task, **{**settings, **dict((self.settings or {}).get(name, {}))})

    def tasks(self) -> dict[str, DataSpec]:
        """The data: all, as many as the Fisher information takes, and the batches of the landscape."""
        data = DataSpec(
            data=self.dataset_name,
            field=self.field,
            label_field=self.label_field,
            task=self.task,  # type: ignore[arg-type]
            num_samples=self.num_samples,
            batch_size=min(self.batch_size, self.max_batch_size),
            seed=self.seed,
            dtype=self.dtype,  # type: ignore[arg-type]
            device=("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device,
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
            force=self.force_recompute or not self.use_cache,
            skip_on_error=self.skip_on_error,
            timeout_seconds=self.timeout_seconds,
            min_batch_size=self.min_batch_size if self.adaptive_batch_sizing else 2**62,
            max_memory_gb=self.max_memory_gb,
            cleanup=self.aggressive_cleanup,
            deterministic=self.deterministic,
            log_memory=self.enable_memory_tracking and self.verbose,
        )


def analyze_models(
    model_paths: Sequence[str | Path | Source], config: UnifiedConfig | None = None, **run_options: Any
) -> Results:
    """Every metric that `config` asks for, on every model: the documented single entry point.

    model_paths: local Hugging Face folders, or sources of your own (`InMemory`, `Checkpoint`). The texts are those of the
    file `config.dataset_name`. Results are keyed by the paths as given; what failed has `error` in place of numbers. With
    `save_results` they are kept under `config.output_dir`, from where `Results.open` brings them back, and what is there
    is not computed again. run_options: `executor`, `watch` of `engine.run`.

    Raises ValueError for no model, no metric, or a configuration that does not fit.
    """
    config = config or UnifiedConfig()
    if isinstance(model_paths, (str, Path)) or not model_paths:
        raise ValueError("`model_paths` must be a list of at least one model, for example ['runs/checkpoint-1000'].")
    metrics, tasks = config.selected(), config.tasks()
    sources = [
        one if not isinstance(one, (str, Path)) else pretrained(one, tasks, config.max_seq_length)
        for one in model_paths
    ]
    out = Path(config.output_dir)
    cache = Cache(out / "cache" if config.use_cache or config.save_results else None)
    outcomes = run(
        metrics,
        sources,
        tasks=tuple(tasks),
        cache=cache,
        options=config.options(),
        quiet=not config.verbose,
        **run_options,
    )
    results = Results(tuple(outcomes))
    if config.save_results:
        results.save(out, {"config": asdict(config)})
    return results


def pretrained(path: str | Path, tasks: Mapping[str, DataSpec], length: int = 512) -> Pretrained:
    """The source of a folder; its step is the number that the name ends with.

    >>> pretrained("runs/checkpoint-1000", {}).step
    1000
    """
    found = STEP.search(str(path).rstrip("/"))
    return Pretrained(str(path), tasks, name=str(path), at=int(found[1]) if found else None, length=length)


def check_kind(name: str, value: Any, default: Any) -> None:
    """A value is of the kind that the default is of."""
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, got {value!r}.")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (isinstance(default, float) and not number) or (type(default) is int and not (number and value == int(value))):
        raise ValueError(f"`{name}` must be a {'whole ' if type(default) is int else ''}number, got {value!r}.")
    if isinstance(default, str) and not isinstance(value, str):
        raise ValueError(f"`{name}` must be text, got {value!r}.")
