"""What is measured: a model on data. Sources say where it comes from and travel to workers; subjects are opened there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..core.model import Functional
from ..core.objective import Loss
from .digest import Sums
from .metric import nearest


@dataclass(frozen=True, eq=False)
class Subject:
    """One model with its losses on the data of every task: what metrics are given their needs from."""

    net: Functional
    theta: Tensor
    """The flat vector of its parameters."""
    open_loss: Callable[[str], Loss]
    """The loss on the data of a task; made when it is first asked for."""
    losses: dict[str, Loss] = field(default_factory=dict)
    texts: Callable[[str], str] = lambda _: ""
    """What is said of the data of a task, after their loss is made."""
    token_names: Callable[[list[int]], list[str]] = lambda ids: [*map(str, ids)]
    is_bare: bool = False
    """Whether theta comes without the running statistics that were trained with it."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """What this subject provides beside the needs that every one has, by name."""

    def loss(self, task: str) -> Loss:
        if task not in self.losses:
            self.losses[task] = self.open_loss(task)
        return self.losses[task]

    @property
    def end(self) -> Functional | Tensor:
        """As an end of a path, where a bare theta is refused: its running statistics are those of other weights."""
        return self.theta if self.is_bare else self.net

    def need(self, name: str, task: str) -> Any:
        """What a metric asks for by this name. Raises ValueError for one that nothing provides."""
        if name in self.own:
            return self.own[name]
        if name not in NEEDS:
            raise ValueError(f"this subject does not provide {name!r}{nearest(name, {*NEEDS, *self.own})}")
        return NEEDS[name](self, task)


NEEDS: dict[str, Callable[[Subject, str], Any]] = {
    "texts": lambda subject, task: subject.texts(task),
    "token_names": lambda subject, _: subject.token_names,
    "start": lambda subject, task: subject.need("members", task)[0].end,
    "end": lambda subject, task: subject.need("members", task)[-1].end,
    "thetas": lambda subject, task: [member.theta for member in subject.need("members", task)],
    "loss": lambda subject, task: subject.loss(task),
    "first_loss": lambda subject, task: subject.loss(subject.need("names_of", task)(task)[0]),
    "second_loss": lambda subject, task: subject.loss(subject.need("names_of", task)(task)[1]),
    "task_losses": lambda subject, task: dict(zip(*_tasks_of(subject, task), strict=True)),
    "experts": lambda subject, task: dict(zip(_tasks_of(subject, task)[0], _thetas(subject), strict=True)),
    "theta": lambda subject, _: subject.theta,
    "net": lambda subject, _: subject.net,
    "params": lambda subject, _: subject.net.layout.unravel(subject.theta),
}
"""By name, how a subject provides it; `key` and the results of other metrics come from the engine.

Of a pair or a series: `start` and `end` are the networks of the first and the last, `thetas` the parameters of all, `members`
the subjects, opened one at a time, `steps` and `names` theirs, `loss` and the others those of the last; `curves` are those of
the training run, where they are known. Of one model on two data sets: `first_loss` and `second_loss`, of the same parameters.
Of a base with models that were fine-tuned from it: `task_losses` and `experts` (thetas) by the names of the data sets, and
`theta`, that of the base.
"""


def _tasks_of(subject: Subject, task: str) -> tuple[tuple[str, ...], list[Loss]]:
    """The data sets of several models, and the losses on them."""
    losses = [subject.loss(each) for each in subject.need("names_of", task)(task)]
    return subject.need("task_names", task), losses


def _thetas(subject: Subject) -> list[Tensor]:
    """Of the models that were fine-tuned. Raises ValueError for one that has not the parameters of the base."""
    thetas = []
    for member in subject.own["members"]:
        if member.net.layout.shapes != subject.net.layout.shapes:
            raise ValueError(
                "the models have parameters of other names or shapes than the base: compare those of one kind."
            )
        thetas.append(member.theta)
    return thetas


@runtime_checkable
class Source(Protocol):
    """Where a subject comes from: small, and can be sent to a worker."""

    @property
    def id(self) -> str:
        """The name in results and figures."""

    @property
    def step(self) -> int | None:
        """The step of training, where it is known."""

    @property
    def group(self) -> str:
        """The training run that it is a checkpoint of; its own name where it is of none."""

    def digest(self, sums: Sums) -> str | None:
        """Of everything but the data that the numbers depend on; None where it cannot be known: nothing is reused then."""

    def data_digest(self, task: str, sums: Sums) -> str:
        """Of the data of a task. Raises ValueError for a task that it does not have."""

    def open(self) -> Subject:
        """The model in memory."""
