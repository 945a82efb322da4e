"""What is looked at before a study begins: names, needs, costs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from .metric import Metric, with_needs
from .subject import Source


def cost(one: Metric) -> float:
    """Forward passes, and one for what every metric costs beside them."""
    try:
        return 1.0 + float(one.cost(one.settings))
    except Exception as err:  # noqa: BLE001
        warnings.warn(f"the cost of {one.name} is not known ({type(err).__name__}: {err}).", stacklevel=3)
        return 1.0


def check_metrics(metrics: Sequence[Metric]) -> None:
    """Raises ValueError where two metrics have one name, and where metrics need each other."""
    names = [one.name for one in {id(one): one for one in metrics}.values()]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two metrics are called {name!r}: give one of them another name, `replace(metric, name=)`."
            )
    behind = set[str]()
    for one in reversed(list(with_needs(metrics))):
        if one.on == "model" and (ring := behind & {*one.needs} or {one.name} & {*one.needs}):
            raise ValueError(
                f"{one.name} needs {sorted(ring)[0]}, which needs {one.name}: one of them must come first."
            )
        behind.add(one.name)


def check_names(sources: Sequence[Source]) -> None:
    """Raises ValueError where two subjects have one name."""
    names = [source.id for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two subjects are called {name!r}: give one of them another name, `name=`.")


ABSENT = {
    "tasks": "looks at one model on two data sets, and there is one: give several by name.",
    "experts": "looks at models that were fine-tuned from one base, each on data of its own: give two data sets or more by "
    "the names of the models' folders, or as many models as data sets in their order, and the base.",
}
"""What is said of metrics whose kind of subject is not there."""


def warn_of_absent(metrics: Sequence[Metric], measured: Sequence[Sequence[Metric]]) -> None:
    """Of metrics that are asked for and measured on nothing: what they look at is not there."""
    for one in metrics:
        if one.on in ABSENT and not any(one in each for each in measured):
            warnings.warn(f"{one.name} {ABSENT[one.on]}", stacklevel=3)
