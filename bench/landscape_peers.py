"""The peers' planes and lines, for `landscape.py` and tests/test_landscape_outsiders.py; none of their code is changed.

Peers, installed by `install_peers.sh`: landscaper 1.3.1, loss-landscapes 3.0.6. landscaper's package imports topology and
plots (gudhi, topopy, nglpy, scikit-learn, matplotlib, ...) that its planes don't need: `landscaper()` imports its modules
`compute` and `utils`, as they are, without the package around them.

Neither says where its points lie; here their own functions are called in their own order to find out:
- landscaper rescales every tensor of a direction to the root of its size, so that a plane of eigenvectors is none, and
  then both directions to num / 2 steps for the distance asked, of which it takes num // 2. Adds random noise to the
  largest loss, and replaces losses that are not finite.
- loss-landscapes draws uniformly from [0, 1], so that every weight grows along both directions, and divides by the distance
  asked. Its rows are numbered i - num / 2; the columns of even rows lie one step further on than those of odd rows.
"""

from __future__ import annotations

import copy
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from cases import Case
from torch import Tensor, nn

import funcscope as fs
from funcscope.landscape.axes import plane_directions
from funcscope.landscape.planes import loss_plane

PACKAGES = {"landscaper": "landscaper", "loss-landscapes": "loss_landscapes"}

Parts = list[Tensor]
"""A direction, or a point, one tensor per parameter."""
Scalar = Callable[[nn.Module], float]
SPAN = 0.1
"""Of every plane, in lengths of theta."""


def installed() -> set[str]:
    return {name for name, module in PACKAGES.items() if find_spec(module)}


class Way(NamedTuple):
    """How a plane is made: `run` takes what `setup` returns. Where `includes`, it makes that itself."""

    setup: Callable[[], Any]
    run: Callable[[Any], object]
    includes: bool = False


class Plane:
    """One model with one batch, and all the ways to a num x num plane."""

    def __init__(self, size: str, cut: tuple[int, int], num: int):
        self.case, self.num = Case(size), num
        self.case.ids = self.case.ids[: cut[0], : cut[1]].contiguous()
        self.model, self.ids = self.case.untouched, self.case.ids
        self.begun: float | None = None

    def scalar(self, model: nn.Module) -> float:
        self.begun = self.begun or time.perf_counter()
        with torch.no_grad():
            return float(model(self.ids, labels=self.ids).loss)

    def bare(self) -> None:
        self.case.bare()

    def ours(self, chunk: int | None = None) -> Way:
        def setup() -> tuple[fs.Loss, Any]:
            net = fs.functional(self.model)
            loss = fs.objective(net, {"input_ids": self.ids}, fs.causal_lm)
            return loss, plane_directions(net, key=fs.key(0))

        return Way(setup, lambda made: loss_plane(made[0], made[0].net.params, made[1], num=self.num, chunk=chunk))

    def landscaper(self) -> Way:
        utils = landscaper().utils

        def setup() -> list[Parts]:
            with seeded(0):
                return utils.generate_random_orthogonal_directions(self.model, 2)

        return Way(setup, lambda dirs: plane_by_landscaper(self.model, self.scalar, dirs, self.num, SPAN))

    def loss_landscapes(self, normalization: str) -> Way:
        far = 1 / (2 * SPAN)  # it divides by the distance that it is given, and goes half as far to either side
        return Way(
            lambda: steps_of_loss_landscapes(self.model, self.num, far, normalization),
            lambda _: plane_by_loss_landscapes(self.model, self.scalar, self.num, far, normalization),
            includes=True,
        )

    def loop(self) -> Way:
        def setup() -> list[Parts]:
            net = fs.functional(self.model)
            return [parts_of(net, row) for row in plane_directions(net, key=fs.key(0)).vectors]

        points = fs.grid(self.num, span=SPAN)
        return Way(setup, lambda dirs: plane_by_loop(self.model, self.scalar, dirs, points))

    def ways(self, names: set[str]) -> dict[str, Way]:
        found = {"funcscope": self.ours()}
        if self.case.size == "0.1M":
            found |= {"funcscope, chunk=1": self.ours(1), "funcscope, chunk=8": self.ours(8)}
        if "landscaper" in names:
            found["landscaper"] = self.landscaper()
        if "loss-landscapes" in names:
            found |= {f"loss-landscapes, {kind}": self.loss_landscapes(kind) for kind in ("layer", "filter")}
        return found | {"plain loop": self.loop()}


def timed(plane: Plane, way: Way) -> tuple[float, float]:
    """Seconds of the set-up and of the points; where the two are one call, the set-up ends with the first evaluation."""
    plane.begun, start = None, time.perf_counter()
    made = None if way.includes else way.setup()
    ready = time.perf_counter()
    way.run(made)
    end = time.perf_counter()
    ready = plane.begun if way.includes and plane.begun else ready
    return ready - start, end - ready


def runnable(plane: Plane, ways: dict[str, Way]) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways that get as far as a plane, one round of which is not counted; and the errors of the others."""
    failed = {}
    for name, way in ways.items():
        try:
            timed(plane, way)
        except ZeroDivisionError as err:
            failed[name] = f"{type(err).__name__}: {err}"
    return {name: way for name, way in ways.items() if name not in failed}, failed


def landscaper() -> SimpleNamespace:
    """Its modules `compute` and `utils`; raises ModuleNotFoundError where it is not installed."""
    if "landscaper" not in sys.modules:
        spec = find_spec("landscaper")
        if spec is None:
            raise ModuleNotFoundError("No module named 'landscaper'", name="landscaper")
        sys.modules["landscaper"] = module_from_spec(spec)  # a package that is not run
    names = ("compute", "utils")
    return SimpleNamespace(**{name: import_module(f"landscaper.{name}") for name in names})


def flat(net: fs.Functional, parts: Sequence[Tensor]) -> Tensor:
    """A direction, one tensor per parameter in the order of the model's, as a vector in that of the layout."""
    named = dict(zip(net.params, parts, strict=True))
    assert all(part.shape == net.params[name].shape for name, part in named.items())
    return net.layout.ravel({name: part.detach() for name, part in named.items()}, parts[0].dtype)


def parts_of(net: fs.Functional, vector: Tensor) -> Parts:
    return [net.layout.unravel(vector, cast=False)[name].clone() for name in net.params]


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
        return sum(float((u.double() * v.double()).sum()) for u, v in zip(x, y, strict=True))

    return dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5


def plane_by_landscaper(model: nn.Module, scalar: Scalar, dirs: list[Parts], num: int, distance: float) -> np.ndarray:
    """num x num losses, restored weights."""
    compute = landscaper().compute
    with quiet():
        losses, _ = compute.compute_loss_landscape(
            model, None, dirs, lambda net, _: scalar(net), steps=num, distance=distance, dim=2, device="cpu"
        )
    return losses


def steps_of_landscaper(model: nn.Module, dirs: list[Parts], num: int, distance: float) -> list[Parts]:
    """What it adds from one point to the next; the points are -(num // 2) steps and upwards."""
    compute, start = landscaper().compute, [p.detach() for p in model.parameters()]
    made = [compute.normalize_direction([part.clone() for part in parts], start) for parts in dirs]
    length = compute.get_model_norm(start) * distance / (num / 2)
    for parts in made:
        compute.scale_direction(parts, length / compute.get_model_norm(parts))
    return made


def plane_by_loss_landscapes(
    model: nn.Module, scalar: Scalar, num: int, distance: float, normalization: str, seed: int = 0
) -> np.ndarray:
    """num x num losses, on a copy of the model: without one it is left where the plane ends."""
    main, metric = import_module("loss_landscapes.main"), _metric(scalar)
    with seeded(seed):
        return main.random_plane(model, metric, distance, num, normalization, deepcopy_model=True)


def steps_of_loss_landscapes(
    model: nn.Module, num: int, distance: float, normalization: str, seed: int = 0
) -> list[Parts]:
    """What it adds from one point to the next, drawn as `random_plane` does."""
    main = import_module("loss_landscapes.main")
    start = main.wrap_model(copy.deepcopy(model)).get_module_parameters()
    with seeded(seed):
        first = main.rand_u_like(start)
        both = first, main.orthogonal_to(first)
    for direction in both:
        getattr(direction, f"{normalization}_normalize_")(start)
    for direction in both:
        direction.mul_(((start.model_norm() / distance) / num) / direction.model_norm())
    return [direction.parameters for direction in both]


def line_by_loss_landscapes(start: nn.Module, end: nn.Module, scalar: Scalar, num: int) -> np.ndarray:
    """num losses at 1/num, 2/num, ..., 1 of the way, on copies."""
    main = import_module("loss_landscapes.main")
    return main.linear_interpolation(start, end, _metric(scalar), num, deepcopy_model=True)


def where_loss_landscapes(losses: Tensor, shifted: bool = True) -> Tensor:
    """From (num + 1)^2 losses at -num/2, ..., num/2 steps, the num x num that it returns, in its order.

    shifted: as it walks; else every row as the even ones.
    """
    num = len(losses) - 1
    rows = [losses[i, 1:] if i % 2 == 0 or not shifted else losses[i, :-1] for i in range(num)]
    return torch.stack(rows)


def plane_by_loop(model: nn.Module, scalar: Scalar, dirs: list[Parts], points: Tensor) -> Tensor:
    """The plain algorithm: at every point all weights are written in place, theta + a d_1 + b d_2; then restored."""
    with torch.no_grad():
        params = list(model.parameters())
        kept = [p.detach().clone() for p in params]
        losses = []
        for a, b in points.tolist():
            for p, at, x, y in zip(params, kept, *dirs, strict=True):
                p.copy_(at + a * x + b * y)
            losses.append(scalar(model))
        for p, at in zip(params, kept, strict=True):
            p.copy_(at)
    return torch.tensor(losses, dtype=torch.float64)


def _metric(scalar: Scalar) -> object:
    base = import_module("loss_landscapes.metrics.metric").Metric

    class Metric(base):
        def __call__(self, wrapper) -> float:
            with torch.no_grad():
                return scalar(wrapper.get_modules()[0])

    return Metric()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """They draw from the global generator, which is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """landscaper prints what it does, with a progress bar."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
