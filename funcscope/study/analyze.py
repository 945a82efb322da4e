"""`analyze_models(model_paths, config)`: the documented entry point, over the catalogue and the engine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .cache import Cache
from .cluster import cluster
from .config import UnifiedConfig
from .engine import run
from .metric import Metric
from .results import Results
from .runs import Runs, is_run
from .sources import STEP, Checkpoint, InMemory, Pretrained
from .subject import Source
from .texts import DataSpec
from .together import PARTS, data_of


def analyze_models(
    model_paths: Sequence[str | Path | Source] | None = None, config: UnifiedConfig | None = None, **run_options: Any
) -> Results:
    """Every metric that `config` asks for, on every model: the documented single entry point.

    model_paths: local Hugging Face folders, run folders of `funcscope train` (all their checkpoints), or sources of your own
    (`InMemory`); without any, `config.model_name`. The texts are those of `config.dataset_name`. Results are keyed
    by the paths as given; what failed has `error` in place of numbers. Metrics of pairs and of series are measured on those
    that the models make. With `save_results` they are kept under `config.output_dir`, from where `Results.open` brings them
    back, and what is there is not computed again. run_options: `executor`, `watch` of `engine.run`; an executor that is
    passed counts before `config.executor` and `config.workers`, with which one is opened here: in a script of your own
    under `if __name__ == "__main__":`, as processes begin by importing it.

    Raises ValueError for no model, no metric, or a configuration that does not fit.
    """
    config = config or UnifiedConfig()
    if model_paths is None and config.model_name is not None:
        model_paths = [config.model_name]
    if isinstance(model_paths, (str, Path)) or not model_paths:
        raise ValueError("`model_paths` must be a list of at least one model, for example ['runs/checkpoint-1000'].")
    metrics = config.selected()
    sources = _apart([source for path in model_paths for source in sources_of(path, config)])
    if all(isinstance(source, Checkpoint) for source in sources):
        tasks, metrics = [config.split], [_on_split(one) for one in metrics]
    else:
        tasks = list(config.tasks())
        if all(isinstance(source, InMemory) and not source.losses.keys() & PARTS for source in sources):
            metrics = [_on_split(one) for one in metrics]
    out = Path(config.output_dir)
    with _workers(config, run_options.pop("executor", None)) as executor:
        outcomes = run(
            metrics,
            sources,
            tasks=tasks,
            cache=Cache(out / "cache" if config.use_cache or config.save_results else None),
            options=config.options(),
            quiet=not config.verbose,
            bases=_bases(config),
            executor=executor,
            **run_options,
        )
    names = [str(path) if isinstance(path, (str, Path)) else path.id for path in model_paths]
    results = Results(tuple(outcomes), {"config": asdict(config), "models": names, "command": _command()})
    if config.save_results:
        results.save(out)
    if config.save_plots:  # figures are a floor above this one, and an extra
        import_module("funcscope.view.report").save_plots(results, out / "figures")
    return results


def _workers(config: UnifiedConfig, given: Executor | None) -> AbstractContextManager[Executor | None]:
    """Those that are passed, else those that the configuration names."""
    if given is None and config.executor is not None:
        return cluster(config.executor, num=config.workers)
    if given is None and config.workers > 1:
        return ProcessPoolExecutor(config.workers, mp_context=get_context("spawn"))
    return nullcontext(given)


def _command() -> str:
    """The line that was typed, where this is the command `funcscope` and not somebody's own program."""
    program = Path(sys.argv[0])
    is_ours = program.stem == "funcscope" or program.parts[-2:] == ("funcscope", "__main__.py")
    return shlex.join(["funcscope", *sys.argv[1:]]) if is_ours else ""


def _bases(config: UnifiedConfig) -> list[Source]:
    """The model that pairs compare the others with, once for each data; of a run, its first checkpoint."""
    if config.base_model is None:
        return []
    each = sources_of(config.base_model, config)
    return list({data_of(one): one for one in reversed(each)}.values())[::-1]


def sources_of(path: str | Path | Source, config: UnifiedConfig) -> list[Source]:
    """The model in a folder, or the checkpoints of every variant of a run folder."""
    if not isinstance(path, (str, Path)):
        return [path]
    if is_run(path):
        return checkpoints_of(path)
    if isinstance(config.dataset_name, str):
        return [pretrained(path, config.tasks(), config.max_seq_length)]
    each = ((name, replace(config, dataset_name=file).tasks()) for name, file in config.dataset_name.items())
    return [pretrained(path, tasks, config.max_seq_length, on=name) for name, tasks in each]


def checkpoints_of(
    folder: str | Path, *, variant: str | None = None, steps: Sequence[int] | None = None
) -> list[Source]:
    """The checkpoints of a run folder, of one variant where it is named, at some steps where they are given.

    Raises ValueError for a variant or a step that it does not have, and where there is no checkpoint.
    """
    runs, sources = Runs(Path(folder)), list[Source]()
    for one in [runs.variant(variant)] if variant else [runs.variant(name) for name in runs.variants()]:
        there = one.checkpoints()
        if missing := sorted({*(steps or ())} - {*there}):
            raise ValueError(f"{one.path} has no checkpoint at step {missing[0]}: it has {', '.join(map(str, there))}.")
        if not there:
            raise ValueError(f"{one.path} has no checkpoints: train it first (`funcscope train`).")
        sources += [Checkpoint(str(one.path), step) for step in there if steps is None or step in steps]
    return sources


def pretrained(path: str | Path, tasks: Mapping[str, DataSpec], length: int = 512, on: str = "") -> Pretrained:
    """The source of a folder; its step is the number that the name ends with. on: the name of the data, of several.

    >>> pretrained("runs/checkpoint-1000", {}).step
    1000
    """
    step = STEP.search(str(path))
    name = f"{path} on {on}" if on else str(path)
    return Pretrained(str(path), tasks, name=name, at=int(step[1]) if step else None, length=length, on=on)


def _apart(sources: Sequence[Source]) -> list[Source]:
    """Variants of one name in several run folders by the names of both."""
    folders: dict[str, set[str]] = {}
    for one in sources:
        if isinstance(one, Checkpoint):
            folders.setdefault(one.group, set()).add(one.variant)
    return [
        replace(one, run="/".join(Path(one.variant).resolve().parts[-2:]))
        if isinstance(one, Checkpoint) and len(folders[one.group]) > 1
        else one
        for one in sources
    ]


def _on_split(one: Metric) -> Metric:
    """On data that are not divided: none are for the Fisher information or the landscape alone."""
    return replace(one, task=None) if one.task in PARTS else one
