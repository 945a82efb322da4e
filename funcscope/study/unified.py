"""The documented classes around `analyze_models`: thin names over the catalogue, the engine and the cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.checks import check_choice
from ..core.criterion import criterion_of
from ..core.model import functional
from ..core.objective import objective
from .analyze import analyze_models
from .cache import Cache
from .catalogue import CATALOGUE, metric
from .config import UnifiedConfig
from .engine import run
from .meter import Options
from .metric import Metric, register
from .results import Metrics, Values
from .sources import InMemory


class ResultCache(Cache):
    """The stored results under a folder, as documented: `get_stats`, `clear_model_cache`, `clear_all`.

    >>> ResultCache("nowhere/cache").get_stats()
    {'num_entries': 0, 'total_size_mb': 0.0}
    """

    def __init__(self, cache_dir: str | Path, max_mb: float | None = None):
        super().__init__(Path(cache_dir), max_mb)


class UnifiedModelAnalyzer:
    """The documented low-level interface: a model and its tokenizer by hand, one group of metrics at a time.

    Results are dictionaries with `.result`, as in `analyze_models`; of models that are passed by hand nothing is stored.
    """

    def __init__(self, config: UnifiedConfig | None = None):
        self.config = config or UnifiedConfig()

    def load_model(self, model_path: str | Path) -> tuple[Any, Any]:
        """The model of a local folder on the configured device and in its dtype, and its tokenizer."""
        from .inputs import load_model, load_tokenizer  # and with them transformers

        spec = self.config.tasks()["data"]
        model = load_model(model_path, task=spec.task, dtype=spec.dtype)
        return model.to(spec.device), load_tokenizer(model_path, model)

    def analyze_model(self, model_path: str | Path) -> Metrics:
        """All metrics that the configuration asks for, by name."""
        return analyze_models([model_path], self.config).models[str(model_path)].metrics

    def compute_fisher_information(self, model: Any, tokenizer: Any) -> dict[str, Values]:
        return self._group("compute_fisher", model, tokenizer)

    def compute_gradient_analysis(self, model: Any, tokenizer: Any) -> dict[str, Values]:
        return self._group("compute_gradients", model, tokenizer)

    def compute_loss_landscape(self, model: Any, tokenizer: Any) -> dict[str, Values]:
        return self._group("compute_loss_landscape", model, tokenizer)

    def _group(self, flag: str, model: Any, tokenizer: Any) -> dict[str, Values]:
        return self.compute(self.config.asked_by(flag), model, tokenizer)

    def compute(self, metrics: Sequence[str], model: Any, tokenizer: Any) -> dict[str, Values]:
        """These metrics of a model in memory, on the configured texts."""
        from .inputs.opened import OpenedModel  # and with it transformers

        tasks, length = self.config.tasks(), self.config.max_seq_length
        opened = OpenedModel(Path(), model, functional(model, trainable="all"), tokenizer)
        source = InMemory({name: opened.loss(spec, length=length)[0] for name, spec in tasks.items()})
        chosen = [self.config.configured(name) for name in metrics]
        outcomes = run(
            chosen, [source], tasks=tuple(tasks), options=self.config.options(), quiet=not self.config.verbose
        )
        return {outcome.metric: Values(outcome) for outcome in outcomes}


class MetricRegistry:
    """The catalogue, as documented: metrics by name, and one's own beside them."""

    def register(
        self,
        name: str,
        category: str,
        compute_fn: Callable[..., Any],
        dependencies: Sequence[str] = ("loss", "theta"),
        batch_size: int | None = None,  # noqa: ARG002
        **settings: Any,
    ) -> Metric:
        """Make a metric known: `compute_fn(*dependencies, **settings)` gives an `fs.Result`.

        dependencies: what subjects provide (`loss`, `theta`, `params`, `net`, `key`) or other metrics. batch_size: of the
        documents; data come in the batches of the configuration, which change no number.
        """
        return register(Metric(name, compute_fn, tuple(dependencies), settings, category=category))

    def get(self, name: str) -> Metric:
        """Raises ValueError for an unknown one, with the nearest there is."""
        return metric(name)

    def names(self) -> list[str]:
        return sorted(CATALOGUE)


class UnifiedModelAnalysis:
    """The pipeline of the document on SAM: sharpness of a model in memory, and whether two measures of it agree."""

    def analyze_model(self, model: Any, data: Iterable[Any], config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """`hessian_eigenvalues` and `sam_sharpness` as `sharpness_methods` ask for, by name.

        data: batches as `fs.objective` takes them. config: `metrics` (["sharpness"]), `sharpness_methods` (of "hessian",
        "sam"), `use_sam_as_sanity_check`, `epsilon` (0.01), `seed` (42). With the check there is `sharpness_check`, by the
        relation that holds, and not by the documented one, which leaves out the slope: S = eps |g| + eps^2/2 g'Hg/|g|^2
        + O(eps^3), and the curvature along the gradient, g'Hg/|g|^2, lies between the smallest eigenvalue and the largest.

        Raises ValueError for other metrics and methods.
        """
        methods = tuple(config.get("sharpness_methods", ("hessian", "sam")))
        for name in config.get("metrics", ["sharpness"]):
            check_choice("metrics", name, ("sharpness",))
        for name in methods:
            check_choice("sharpness_methods", name, ("hessian", "sam"))
        loss = objective(functional(model, trainable="all"), data, criterion_of(model))
        chosen = {
            "hessian": metric("hessian_eigenvalues"),
            "sam": metric("sam_sharpness").configured(epsilon=config.get("epsilon", 0.01)),
        }
        options = Options(seed=config.get("seed", 42), skip_on_error=False)
        outcomes = run([chosen[name] for name in methods], [InMemory({"data": loss})], options=options)
        values: dict[str, dict[str, Any]] = {outcome.metric: Values(outcome) for outcome in outcomes}
        if config.get("use_sam_as_sanity_check") and set(methods) == {"hessian", "sam"}:
            values["sharpness_check"] = _checked(values["hessian_eigenvalues"], values["sam_sharpness"])
        return values


def _checked(spectrum: Mapping[str, Any], sam: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the curvature along the gradient lies between the ends of the spectrum, as far as these are known."""
    low, high = spectrum["min_eigenvalue"], spectrum["max_eigenvalue"]
    slack = 1e-3 * max(abs(low), abs(high)) + max(spectrum["max_residual"], spectrum["min_residual"])
    agree = low - slack <= sam["curvature"] <= high + slack
    if not agree:
        warnings.warn(
            f"the curvature along the gradient, {sam['curvature']:.4g}, lies outside the spectrum, {low:.4g} to {high:.4g}: "
            "one of the two is wrong; `fs.audit` says which derivative.",
            stacklevel=3,
        )
    return {"curvature_along_gradient": sam["curvature"], "min_eigenvalue": low, "max_eigenvalue": high, "agree": agree}
