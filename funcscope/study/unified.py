"""The documented classes around `analyze_models`: thin names over the catalogue, the engine and the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.model import functional
from .analyze import analyze_models
from .cache import Cache
from .config import UnifiedConfig
from .engine import run
from .inputs import load_model, load_tokenizer
from .opening import OpenedModel
from .results import Metrics, Values
from .subject import InMemory


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

    def load_model(self, model_path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model of a local folder on the configured device and in its dtype, and its tokenizer."""
        spec = self.config.tasks()["data"]
        model = load_model(model_path, task=spec.task, dtype=spec.dtype)
        return model.to(spec.device), load_tokenizer(model_path, model)

    def analyze_model(self, model_path: str | Path) -> Metrics:
        """All metrics that the configuration asks for, by name."""
        return analyze_models([model_path], self.config).models[str(model_path)].metrics

    def compute_fisher_information(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Values]:
        return self._group("compute_fisher", model, tokenizer)

    def compute_gradient_analysis(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Values]:
        return self._group("compute_gradients", model, tokenizer)

    def compute_loss_landscape(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Values]:
        return self._group("compute_loss_landscape", model, tokenizer)

    def _group(self, flag: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Values]:
        return self.compute(self.config.asked_by(flag), model, tokenizer)

    def compute(
        self, metrics: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Values]:
        """These metrics of a model in memory, on the configured texts."""
        tasks, length = self.config.tasks(), self.config.max_seq_length
        opened = OpenedModel(Path(), model, functional(model, trainable="all"), tokenizer)
        source = InMemory({name: opened.loss(spec, length=length)[0] for name, spec in tasks.items()})
        chosen = [self.config.configured(name) for name in metrics]
        outcomes = run(
            chosen, [source], tasks=tuple(tasks), options=self.config.options(), quiet=not self.config.verbose
        )
        return {outcome.metric: Values(outcome) for outcome in outcomes}
