"""A metric: a pure function, what it needs, and what is to be known of it. The functions do not know of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal

from ..core.checks import check_choice
from ..core.result import Result
from .modules import IMPORTED, OwnModule, own_modules

NAME = re.compile(r"[a-z][a-z0-9_]*")
MOST_NAMES = 20
"""Of more than so many names, a message has the nearest alone."""
KEY = "key"
"""The need that is passed by keyword, as everywhere in the package."""


def _one_pass(settings: Mapping[str, Any]) -> float:  # noqa: ARG001
    return 1.0  # of a name, so that a metric can be pickled


@dataclass(frozen=True, eq=False)
class Metric:
    """One thing that is measured on a subject: caching, tables, figures and pages come from this and its result.

    A long metric may return its sampling instead of its result, an object with `rows(first)` (dictionaries of tensors, one
    row per draw, those from `first` on) and `result(rows)`: what is interrupted then goes on from the rows that it has.
    """

    name: str
    """Small letters, digits and underscores."""
    call: Callable[..., Any]
    """The function: `call(*needs, **settings)`, `key=` where it needs one. It gives a `Result`."""
    needs: tuple[str, ...] = ("loss", "theta")
    """In the order of the arguments: names that subjects provide (`loss`, `theta`, `net`, `params`, `key`, ...), or other
    metrics, whose results it is given."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `call` with their values here: what is measured."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments that say how and change no number beyond rounding: one result serves all of them. `chunk` and
    `chunk_size` are halved where memory runs out."""
    asked: frozenset[str] = frozenset()
    """Names of the plan that were set: a study chooses none of these."""
    category: str = "your own"
    cost: Callable[[Mapping[str, Any]], float] = _one_pass
    """Forward passes over the data that it will take, from its settings."""
    version: int = 1
    """To be raised when the function changes: stored results of another version are not used."""
    on: Literal["model", "tasks", "experts", "pair", "series"] = "model"
    """What it looks at: one model, one on two data sets (`first_loss`, `second_loss`), models that were fine-tuned from one
    base with the data of each (`task_losses`, `experts`, `theta`), two models, or the checkpoints of a run. The results of
    other metrics that it needs are, of several models, those of all of these, in a tuple."""
    at: Literal["every", "phases"] = "every"
    """Of a training run, every checkpoint, or the start, where it has memorised, and the end."""
    by_batch: bool = False
    """Whether its numbers depend on which sequences share a batch, which is then never split and part of what they are of."""
    task: str | None = None
    """The data that it looks at, by name; the study's first where it has no preference."""
    reference: str = ""
    drawn: tuple[str, ...] = ()
    """The quantities that its page has figures of, by their documented names; all of them where none is named."""
    sentence: str = ""
    """What its result says, with documented names in braces: "The largest eigenvalue is {max_eigenvalue}."."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"a metric is named by small letters, digits and underscores, got {self.name!r}.")
        if both := sorted(self.settings.keys() & self.plan.keys()):
            raise ValueError(f"{self.name} has {both[0]!r} among its settings and in its plan: it is one of them.")

    def __repr__(self) -> str:
        return f"Metric({self.name!r}, {dict(self.settings)})"

    def __reduce__(self) -> Any:
        """By name where it is registered, so that a worker takes it from its own catalogue."""
        if CATALOGUE.get(self.name, self).call is self.call and self.name in CATALOGUE:
            given = {name: getattr(self, name) for name in ("task", "at", "version", "asked")}
            given |= {"settings": dict(self.settings), "plan": dict(self.plan)}
            return _remade, (self.name, given, own_modules([_module(self)]))
        return super().__reduce__()

    @property
    def summary(self) -> str:
        """What it measures: the first line of its function's documentation, without what that refers to."""
        return re.sub(r"; see `[\w.]+`| See `[\w.]+`\.", "", (inspect.getdoc(self.call) or "").partition("\n")[0])

    def configured(self, *, task: str | None = None, at: str | None = None, **changes: Any) -> Metric:
        """The same with other settings, on other data, at other checkpoints.

        Raises ValueError for a setting that it does not have.
        """
        check_choice("at", at or self.at, ("every", "phases"))
        known = self.settings.keys() | self.plan.keys()
        for name in changes.keys() - known:
            raise ValueError(f"{self.name} has no setting {name!r}{nearest(name, known)}")
        return replace(
            self,
            task=task or self.task,
            at=at or self.at,  # type: ignore[arg-type]
            settings={name: changes.get(name, value) for name, value in self.settings.items()},
            plan={name: changes.get(name, value) for name, value in self.plan.items()},
            asked=self.asked | (changes.keys() & self.plan.keys()),
        )


def of_function(
    name: str,
    call: Callable[..., Any],
    needs: tuple[str, ...],
    *,
    plan: Sequence[str] = ("chunk", "lazy"),
    without: Sequence[str] = (),
    more: Mapping[str, Any] = MappingProxyType({}),
    **about: Any,
) -> Metric:
    """A metric whose settings are the keyword arguments of its function, with the values that these have by themselves.

    plan: those that are no settings but the plan. without: those that a study does not set. more: settings beside them, for
    a function that passes `**options` on.

    >>> def largest(loss, theta, *, key, num=5, chunk=None): ...
    >>> made = of_function("largest", largest, ("loss", "theta", "key"))
    >>> made.settings, made.plan
    ({'num': 5}, {'chunk': None})
    """
    arguments = inspect.signature(call).parameters.values()
    defaults = {each.name: each.default for each in arguments if each.kind is each.KEYWORD_ONLY and each.name != KEY}
    settings = {each: value for each, value in (defaults | dict(more)).items() if each not in (*plan, *without)}
    return Metric(name, call, needs, settings, {each: defaults[each] for each in plan if each in defaults}, **about)


CATALOGUE: dict[str, Metric] = {}
"""All metrics by name."""


def register(one: Metric) -> Metric:
    """Make a metric known by its name, and return it; one of your own that was registered before is replaced.

    Raises ValueError for the name of one that is not from your module.

    >>> import torch, funcscope as fs
    >>> class Norm(fs.Result):
    ...     norm: float = fs.quantity("norm of the weights")
    >>> ours = Metric("weight_norm", lambda theta: Norm(float(theta.norm())), needs=("theta",))
    >>> register(ours) is metric("weight_norm")
    True
    >>> del CATALOGUE["weight_norm"]
    """
    known = CATALOGUE.setdefault(one.name, one)
    if _module(known) != _module(one):
        raise ValueError(f"the name {one.name!r} is that of a metric of {_module(known)}: choose another.")
    CATALOGUE[one.name] = one
    return one


def metric(name: str) -> Metric:
    """The metric of that name. Raises ValueError for an unknown one, with the nearest there is."""
    if name not in CATALOGUE:
        raise ValueError(f"no metric {name!r}{nearest(name, CATALOGUE)}")
    return CATALOGUE[name]


def nearest(name: str, known: Sequence[str] | Mapping[str, Any] | Any) -> str:
    """The end of a sentence about a name that does not exist.

    >>> nearest("epsilo", ["epsilon", "num"]), nearest("x", [])
    (": did you mean 'epsilon'? There are epsilon, num.", ': there are none.')
    """
    names = list(known)
    near = get_close_matches(name, names, 1)
    if near and len(names) > MOST_NAMES:
        return f": did you mean {near[0]!r}?"
    there = f"here are {', '.join(sorted(names)) or 'none'}."
    return f": did you mean {near[0]!r}? T{there}" if near else f": t{there}"


def with_needs(metrics: Sequence[Metric]) -> Iterator[Metric]:
    """The metrics in an order in which each comes after those whose results it needs, which are added where they lack."""
    asked, seen = {one.name: one for one in metrics}, set[str]()

    def visit(one: Metric) -> Iterator[Metric]:
        if one.name not in seen:
            seen.add(one.name)
            for name in one.needs:
                if one.on == "model" and (name in CATALOGUE or name in asked):
                    yield from visit(asked.get(name) or replace(metric(name), task=one.task))
            yield one

    for one in metrics:
        yield from visit(one)


def with_members(metrics: Sequence[Metric]) -> Iterator[Metric]:
    """The metrics, and before them those that a pair or a series needs of each of its subjects."""
    names = {one.name for one in metrics}
    for one in metrics:
        for name in one.needs:
            if one.on != "model" and name in CATALOGUE and name not in names:
                names.add(name)
                yield replace(metric(name), task=one.task)
    yield from metrics


def modules_of(metrics: Iterable[Metric]) -> tuple[OwnModule, ...]:
    """The user's own modules that a worker needs for these: those that were asked for, and those of registered metrics."""
    known = (one for one in with_needs(list(metrics)) if getattr(CATALOGUE.get(one.name), "call", None) is one.call)
    return own_modules([*IMPORTED, *map(_module, known)])


def _module(one: Metric) -> str:
    return str(getattr(one.call, "__module__", None))


def _remade(name: str, given: dict[str, Any], own: tuple[OwnModule, ...]) -> Metric:
    """Of the worker's own catalogue, which its module fills; one that is absent says so when its subject's turn comes."""
    from . import catalogue as catalogue  # a worker may not have filled it yet

    said = (
        f"the metric {name!r} is registered by the script that calls the study: put it into a module, and import that."
    )
    for module in own if name not in CATALOGUE else ():
        said = f"the module {module.name!r} registers no metric {name!r} where it is imported: register it at its top level."
        try:
            module.imported()
        except ValueError as err:
            said = str(err)
    known = CATALOGUE.get(name) or Metric(name, Absent(said))
    return replace(known, **given)


@dataclass(frozen=True)
class Absent:
    """In place of the function of a metric that a worker does not know."""

    said: str

    def __call__(self, *_: Any, **__: Any) -> Result:
        raise ValueError(self.said)


def check_result(one: Metric, value: Any) -> Result:
    """What a metric must give."""
    if not isinstance(value, Result):
        raise TypeError(
            f"{one.name} gave a {type(value).__name__}, and a metric gives an `fs.Result`: a class with `fs.quantity` fields "
            "says what its numbers are."
        )
    value.meta()  # raises TypeError for a field that has no stored form
    return value
