"""What a family of models gives: a model, data, a loss, training and named variants. Data about functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..core.checks import check_choice
from ..core.criterion import Criterion
from ..core.model import Functional
from ..core.objective import Loss, objective

SPLITS = ("train", "test", "probe")


class Kept(NamedTuple):
    """A checkpoint: its parameters, and the checksum of the file they came from."""

    params: dict[str, Tensor]
    sha256: str
    buffers: Mapping[str, Tensor] | None = None
    """Those that belong to these parameters: the running statistics of a network that tracks any, without which it is
    refused."""


class Setup(NamedTuple):
    """A variant: a configuration (a frozen dataclass), and the steps at which checkpoints are kept."""

    config: Any
    checkpoints: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Family:
    """One kind of model that is trained and analysed, whatever reads the results.

    A family lives in one file that ends with `register(Family(...))`. Configurations are frozen dataclasses of plain values;
    a property `name`, where they have one, names their folder.
    """

    name: str
    variants: Mapping[str, Setup]
    config: Callable[..., Any]
    """Makes a configuration from its fields as stored."""
    network: Callable[[Any], Functional]
    """The model of a configuration as a pure function; its own weights are the untrained ones."""
    batches: Callable[[Any, str], Iterable[Any]]
    """The data of a split: `train`, `test`, or `probe`, which every checkpoint is looked at with."""
    criterion: Criterion | None
    """What is scored. Without it nothing that needs a loss can run: `loss` says so."""
    train: Callable[[Any, Path, Sequence[int]], Iterator[Any]]
    """Trains in a folder, or goes on, keeping checkpoints at these steps; yields points of the curves (named tuples with
    `step`, `train_loss`, `test_loss`, `train_accuracy`, `test_accuracy`), stored ones first."""
    checkpoint: Callable[[Any, Path, int], Kept]
    """The checkpoint of a step. Raises FileNotFoundError, Damaged, or ValueError for one of another configuration."""

    def loss(self, net: Functional, config: Any, split: str) -> Loss:
        """The mean loss over one split, as a function of theta."""
        check_choice("split", split, SPLITS)
        if self.criterion is None:
            raise ValueError(
                f"the family {self.name!r} gives no loss, and a guess would measure something else: "
                "set `criterion=` where it is registered, for example `fs.classification`."
            )
        return objective(net, list(self.batches(config, split)), self.criterion)

    def configured(self, stored: Mapping[str, Any]) -> Any:
        """The configuration of stored fields; ValueError where they are not this family's."""
        try:
            return self.config(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()})
        except TypeError as err:
            raise ValueError(f"this is no configuration of the family {self.name!r}: {err}.") from err

    def setup(self, variant: str) -> Setup:
        """The variant of that name."""
        if variant not in self.variants:
            raise ValueError(f"{self.name!r} has no variant {variant!r}: it has {', '.join(self.variants)}.")
        return self.variants[variant]


_REGISTERED: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known by its name, and return it.

    Raises ValueError for a name that another family has.
    """
    known = _REGISTERED.setdefault(family.name, family)
    if known is not family and _identity(known) != _identity(family):
        raise ValueError(f"the name {family.name!r} is taken by another family.")
    _REGISTERED[family.name] = family
    return family


def family(name: str) -> Family:
    """The family of that name.

    Raises ValueError for an unknown one, with those there are.

    >>> from funcscope.families import modular
    >>> family("modular_addition") is modular.FAMILY
    True
    """
    if name not in _REGISTERED:
        raise ValueError(
            f"no family {name!r} is registered: there {'is' if len(_REGISTERED) == 1 else 'are'} "
            f"{', '.join(sorted(_REGISTERED))}. A family of your own is registered by the module that defines it: "
            "import it first, on the command line with `--import MODULE`."
        )
    return _REGISTERED[name]


def _identity(family: Family) -> dict[str, Any]:
    """What tells one family from another of the same name: its module and its configurations."""
    variants = {name: asdict(setup.config) for name, setup in family.variants.items()}
    return {"module": family.train.__module__, "variants": variants}
