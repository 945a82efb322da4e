"""What every result is: fields and properties that say what they are, once. Tables, frames and storage come from that."""

from __future__ import annotations

import dataclasses
import html
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, dataclass_transform

from torch import Tensor

from . import store, tables
from .keys import Key
from .pack import Packed, equal, pack, storable, unpack
from .store import Stored
from .tables import Entry, Quantity, is_estimate

if TYPE_CHECKING:
    from pandas import DataFrame

T = TypeVar("T")
R = TypeVar("R", bound="Result")


def _described(
    label: str, unit: str = "", per: str | tuple[str, ...] = (), name: str = "", stderr: str = "", shown: bool = True
) -> Quantity:
    return Quantity(label, unit, (per,) if isinstance(per, str) else per, name, stderr, shown)


def quantity(label: str, *, default: Any = MISSING, **what: Any) -> Any:
    """A field that holds a quantity. what: unit, per (axes), name (as documented), stderr (an attribute), shown.

    The unit "loss" is that of the criterion: nats for a cross-entropy.
    """
    return field(default=default, metadata={"quantity": _described(label, **what)})


def internal(*, default: Any = MISSING) -> Any:
    """A field that others are computed from, stored with them and in no dictionary or table."""
    return field(default=default, metadata={"internal": True})


class Derived(cached_property[T], Generic[T]):
    """A property that is a quantity; made by `derived`."""

    quantity: Quantity


def derived(label: str, **what: Any) -> Callable[[Callable[[Any], T]], Derived[T]]:
    """A property that is a quantity, computed once from the fields. what: as for `quantity`."""

    def decorate(compute: Callable[[Any], T]) -> Derived[T]:
        made = Derived(compute)
        made.quantity = _described(label, **what)
        return made

    return decorate


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(quantity, internal, field))
class Result:
    r"""The base of every result: subclasses are frozen dataclasses whose quantities describe themselves.

    `quantity(...)` fields and `@derived(...)` properties are numbers, `Estimate`s, tensors with named axes, or mappings of
    these. Other fields are settings. A subclass says its first line (`head`), what a reader must know beside the numbers
    (`notes`) and the names along its axes (`coords`); everything else is here.

    >>> import torch
    >>> from funcscope.core.estimate import Estimate
    >>> class Widths(Result):
    ...     '''Widths of layers.'''
    ...     widths: Tensor = quantity("width", unit="neurons", per="layer")
    ...     seed: int = 0
    ...     @derived("mean width", unit="neurons")
    ...     def mean_width(self) -> Estimate:
    ...         return Estimate.of(self.widths)
    >>> result = Widths(torch.tensor([2.0, 4.0]))
    >>> print(result)
    Widths
    <BLANKLINE>
    ----------  ---------
    mean_width  3.0 ± 1.0
    ----------  ---------
    >>> sorted(result.asdict())
    ['mean_width', 'mean_width_stderr', 'seed', 'widths']
    >>> Result.restore(Stored(result.arrays(), result.meta(), "")) == result
    True
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        storable(dataclass(frozen=True, eq=False, repr=False)(cls))

    @property
    def head(self) -> str:
        """The line above the table."""
        return type(self).__name__

    @property
    def notes(self) -> Sequence[str]:
        """What is not resolved or undefined, and why."""
        return ()

    @property
    def unresolved(self) -> Collection[str]:
        """Documented names of the values that these samples, steps or digits do not resolve."""
        return ()

    @property
    def texts(self) -> Mapping[str, str]:
        """By documented name, what tables say where a value with its error would not say enough."""
        return {}

    @property
    def coords(self) -> Mapping[str, Sequence[Any]]:
        """Names or numbers along the axes; positions, from 0 as in arrays, where an axis is not here. Ranks count from 1."""
        return {}

    @property
    def axis_titles(self) -> Mapping[str, str]:
        """What the numbers along an axis are, where its name alone does not say so."""
        return {}

    @classmethod
    @cache
    def quantities(cls) -> dict[str, Quantity]:
        """By attribute: fields first, in their order."""
        known = {each.name: each.metadata["quantity"] for each in fields(cls) if "quantity" in each.metadata}  # type: ignore[arg-type]
        of_class = (item for base in reversed(cls.__mro__) for item in vars(base).items())
        return known | {name: each.quantity for name, each in of_class if isinstance(each, Derived)}

    def entries(self, only: str | None = None) -> Iterator[Entry]:
        """Every quantity that is there, mappings of named ones taken apart.

        only: the one of this documented name, without computing the others.
        """
        for attribute, what in self.quantities().items():
            if only is not None and what.name != "*" and only != (what.name or attribute):
                continue
            value = getattr(self, attribute)
            stderr = getattr(self, what.stderr) if what.stderr else None
            if what.name == "*":
                for name, each in value.items():
                    yield Entry(name, what, each, None if stderr is None else stderr.get(name))
            elif value is not None:
                yield Entry(what.name or attribute, what, value, stderr)

    def asdict(self) -> dict[str, Any]:
        """Quantities and settings by their documented names: plain numbers, strings and numpy arrays.

        Standard errors are `<name>_stderr`; what was not asked for is absent.
        """
        values: dict[str, Any] = {}
        for name, _, value, _ in self.entries():
            values |= _plain(name, value)
        for each in fields(self):  # type: ignore[arg-type]
            if not each.metadata:
                values |= _plain(each.name, getattr(self, each.name))
        return values

    def arrays(self) -> dict[str, Any]:
        """Every array of every field, by its path, copied: with `meta`, what `restore` needs."""
        return {path: x.clone() if isinstance(x, Tensor) else x.copy() for path, x in self._packed.arrays.items()}

    def meta(self) -> dict[str, Any]:
        """All that is no array, as JSON can say it."""
        return self._packed.tree

    @classmethod
    def restore(cls: type[R], stored: Stored) -> R:
        """The result that was stored: equal to the one whose `arrays` and `meta` these are.

        Raises ValueError for what is no result, or of another class.
        """
        result = unpack(Packed(dict(stored.arrays), stored.meta))
        if not isinstance(result, cls):
            raise ValueError(f"this is a stored {type(result).__name__}, no {cls.__name__}.")
        return result

    def save(self, path: str | Path) -> None:
        """Write to one `.npz` or `.safetensors` file, whole or not at all, and what is no array to a `.json` beside it."""
        store.save(Path(path), self.arrays(), self.meta())

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """What `save` wrote. Raises FileNotFoundError, `store.Damaged` for a file that was changed, and as `restore`."""
        return cls.restore(store.load(Path(path)))

    def frame(self) -> DataFrame:
        """Tidy: a row per number, with its quantity, unit, axes (nan where a quantity is not per one) and errors.

        `resolved` is False for those in `unresolved`.
        """
        return tables.frame(self.entries(), self.coords, self.unresolved)

    def table(self, tablefmt: str = "simple") -> str:
        """Numbers as rows; what is per one named axis as a table of its own, per two as a matrix."""
        return tables.table(self.entries(), self.coords, self._texts, tablefmt)

    def __str__(self) -> str:
        return "\n".join([self.head, "", self.table(), *(textwrap.fill(text, 100) for text in self.notes)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *notes = (f"<p>{html.escape(text)}</p>" for text in (self.head, *self.notes))
        return "\n".join([head, self.table("html"), *notes])

    def __eq__(self, other: object) -> bool:
        """The same class with the same fields to the last bit, nan equal to nan."""
        return isinstance(other, Result) and equal(self._packed, other._packed)

    __hash__ = None  # type: ignore[assignment]

    @property
    def _texts(self) -> dict[str, str]:
        return dict.fromkeys(self.unresolved, "not resolved") | dict(self.texts)

    @cached_property
    def _packed(self) -> Packed:
        return pack(self)


def _plain(name: str, value: Any) -> dict[str, Any]:
    """By documented names, in plain numbers, strings and numpy arrays."""
    if value is None:
        return {}
    if is_estimate(value):
        return value.named(name)
    if isinstance(value, Key):
        of = "" if name == "key" else f"{name}_"
        draws = {} if value.stream == "cpu" else {f"{of}draws": value.stream}
        return {f"{of}seed": value.seed, name: f"{value.bits:032x}", **draws}
    if isinstance(value, Result):
        return {f"{name}_{inner}": each for inner, each in value.asdict().items()}
    if isinstance(value, Mapping) or hasattr(value, "_asdict"):
        parts = value.items() if isinstance(value, Mapping) else value._asdict().items()
        return {key: each for inner, part in parts for key, each in _plain(f"{name}_{inner}", part).items()}
    if dataclasses.is_dataclass(value):
        return {}
    if isinstance(value, Tensor):
        return {name: value.detach().cpu().numpy().copy() if value.ndim else value.item()}
    return {name: value}
