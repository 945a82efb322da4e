"""Axes of lines and planes: random and orthogonal, principal ones of a trajectory, Hessian eigenvectors, or given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count, check_instance
from ..core.directions import Normalize, directions, stack
from ..core.keys import Distribution, Key
from ..core.layout import Params
from ..core.model import Functional
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from ..linalg.eigen import Eigenpairs
from .orthogonal import blocks, gram, orthogonalise, orthonormalise

Kind = Literal["random", "principal", "eigenvectors", "given"]


class Axes(Result):
    """k vectors of parameter space, with the names that figures give them; where they came from is in `settings`."""

    vectors: Float[Tensor, "k p"] = internal()
    names: tuple[str, ...]
    kind: Kind
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def _gram(self) -> Tensor:
        return gram(self.vectors)

    @derived("Euclidean norm", per="axis")
    def norms(self) -> Float[Tensor, " k"]:
        """In float64."""
        return self._gram.diagonal().sqrt()

    @derived("largest |cosine| of two axes")
    def cosine(self) -> float:
        """0 where the axes are orthogonal or there is one, 1 where two are parallel; nan where one is 0."""
        unit = self._gram / (self.norms[:, None] * self.norms)
        return float(unit.triu(1).abs().max()) if len(self) > 1 else 0.0

    def pick(self, *indices: int) -> Axes:
        """Some of the axes, in this order: two of them make a plane."""
        chosen = list(indices)
        settings = {
            name: [value[i] for i in chosen] if isinstance(value, list) else value
            for name, value in self.settings.items()
        }
        return Axes(self.vectors[chosen], tuple(self.names[i] for i in chosen), self.kind, settings)

    def within_span(self) -> Axes:
        """The same axes in coordinates of their own span, k numbers each: norms and angles without parameter space.

        What is to be stored of axes that a key, or the models, give again.
        """
        values, vectors = torch.linalg.eigh(self._gram)
        factor = vectors * values.clamp(min=0).sqrt()  # factor factor' = gram, parallel axes among them
        return replace(self, vectors=factor.cpu())

    @property
    def head(self) -> str:
        return f"{len(self)} axes ({self.kind}) of {self.vectors.shape[1]:,} coordinates"

    @property
    def coords(self) -> dict[str, tuple[str, ...]]:
        return {"axis": self.names}


class Trajectory(Result):
    """A sequence of parameter vectors and the plane that is closest to it; made by `principal_directions`."""

    axes: Axes = internal()
    origin: Float[Tensor, " p"] = internal()
    coordinates: Float[Tensor, "m num"] = quantity("coordinate from the origin", per=("point", "axis"))
    """Of each point along the axes; float64."""
    explained: Float[Tensor, " num"] = quantity("share of the squared distances", per="axis")
    """Of the points' squared distances to the origin, what each axis takes up, in descending order."""
    residuals: Float[Tensor, " m"] = quantity("distance from the span of the axes", per="point")

    @derived("name of the axis", per="axis", shown=False)
    def axis_names(self) -> list[str]:
        return list(self.axes.names)

    @property
    def head(self) -> str:
        return f"{counted(len(self.coordinates), 'point')} on {counted(len(self.axes), 'principal axis', 'principal axes')}"

    @property
    def coords(self) -> dict[str, Any]:
        return {"point": range(len(self.coordinates)), "axis": self.axes.names}


def plane_directions(
    net: Functional,
    *,
    key: Key,
    normalize: Normalize = "filter",
    distribution: Distribution = "normal",
    num: int = 2,
    base: Params | None = None,
) -> Axes:
    r"""`num` random directions, orthogonal within every group and with the group norms of the parameters.

    Draws $z_1, z_2, \dots$ as in `directions`; in each group G, Gram-Schmidt, then the norm:

    $$d_{i,G} = \|\theta_G\| \, \frac{r_{i,G}}{\|r_{i,G}\|}, \qquad
      r_{i,G} = z_{i,G} - \sum_{j<i} \frac{\langle z_{i,G}, d_{j,G} \rangle}{\|d_{j,G}\|^2} d_{j,G}.$$

    So $\langle d_i, d_j \rangle = 0$ and $\|d_{i,G}\| = \|\theta_G\|$ both hold to the rounding of the dtype; rescaling
    groups after a Gram-Schmidt over all of them would lose the first: proofs/grouped_orthogonality.py. Sums are in float64.
    The first direction is that of `directions`, up to rounding, but for pooled coordinates and groups that are drawn again.

    normalize: the groups, as in `directions`: `filter`, `layer`, or `global` (orthonormal vectors).
    base: the parameters whose norms are used; default `net.params`.

    A group of fewer than `num` coordinates (a scalar, a row of a weight of shape (n, 1)) has no room for `num` orthogonal
    parts. All such coordinates are pooled into one group over the whole model, with normal entries and the norm that
    they have together; where the pool itself is too small, the smallest other group joins it. `settings["num_pooled"]`
    counts them. Groups of norm 0 stand still. A draw that is linearly dependent within its group (random signs in small
    groups) is drawn again, with normal entries.

    Raises ValueError for fewer than `num` coordinates that may move, and as `directions` does.

    Li, Xu, Taylor, Studer, Goldstein (2018), Visualizing the loss landscape of neural nets, section 4.

    >>> from funcscope.core.keys import key
    >>> from funcscope.core.model import functional
    >>> axes = plane_directions(functional(torch.nn.Linear(30, 2)), key=key(0))
    >>> axes.cosine < 1e-7, axes.names
    (True, ('direction 1', 'direction 2'))
    """
    check_count("num", num)
    dirs = directions(net, key=key, num=num, normalize=normalize, distribution=distribution, base=base)
    vectors = stack(dirs)
    pooled = orthogonalise(vectors, dirs[0].scales, key)
    settings = {
        "normalize": normalize,
        "distribution": distribution,
        "num_pooled": pooled,
        "seed": key.seed,
        "key": f"{key.bits:032x}",
    } | ({} if key.stream == "cpu" else {"draws": key.stream})
    return Axes(vectors, tuple(f"direction {i + 1}" for i in range(num)), "random", settings)


def principal_directions(
    thetas: Float[Tensor, "m p"] | Sequence[Tensor], *, num: int = 2, center: Literal["last", "mean"] = "last"
) -> Trajectory:
    r"""The orthonormal axes along which a sequence of checkpoints spreads most: its principal components.

    With X the differences of the m points to the origin and $X X^\top = U \Lambda U^\top$ (m x m, in float64):

    $$v_i = X^\top u_i / \sqrt{\lambda_i}, \qquad \text{coordinates} = X V, \qquad
      \text{explained}_i = \lambda_i / \operatorname{tr} \Lambda.$$

    center: `last` takes differences to the last point, as Li et al. do: the shares are those of squared distances to it,
    not of a variance. `mean` is the usual principal component analysis. Any two points lie in a plane with a third one:
    with few points, or a random walk (Antognini and Sohl-Dickstein 2018), a large share says little about the landscape.

    Coordinates and residuals have the unit of theta. The sign of an axis makes its largest coordinate positive. A plane
    through the checkpoints of a net that tracks running statistics (BatchNorm) needs those of every point:
    `loss_plane(..., buffers="reestimate")`.

    Raises ValueError for fewer than two points, points of different shapes, values that are not finite, and where the
    points span fewer than `num` dimensions.

    Li, Xu, Taylor, Studer, Goldstein (2018), Visualizing the loss landscape of neural nets, section 7.

    >>> path = principal_directions(torch.tensor([[3.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]))
    >>> [round(float(x), 3) for x in path.explained], float(path.residuals.max()) < 1e-6
    ([0.758, 0.242], True)
    """
    check_count("num", num)
    check_choice("center", center, ("last", "mean"))
    points = _stacked(thetas)
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(f"`thetas` must be at least two flat vectors (m, p), got shape {tuple(points.shape)}.")
    origin = points[-1] if center == "last" else points.double().mean(0).to(points.dtype)
    if bad := [i for i, point in enumerate(points) if not bool(point.isfinite().all())]:
        raise ValueError(f"`thetas` holds values that are not finite in the points {bad}: leave those checkpoints out.")
    values, vectors = torch.linalg.eigh(gram(points, origin))
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values > 1e-12 * values[0]).sum()) if values[0] > 0 else 0
    if rank < num:
        raise ValueError(
            f"the {len(points)} points span {rank} dimensions, fewer than `num` = {num}: ask for fewer axes."
        )
    axes = _combined(points, origin, vectors[:, :num])
    coordinates, residuals = project(points, origin, axes)
    largest = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(largest < 0, -1.0, 1.0).to(coordinates)
    explained = (values[:num] / values.clamp(min=0).sum()).cpu()
    names = tuple(f"principal {i + 1} ({100 * float(share):.3g} %)" for i, share in enumerate(explained))
    turned = Axes(axes * sign[:, None].to(axes), names, "principal", {"center": center, "num_points": len(points)})
    return Trajectory(turned, origin.clone(), coordinates * sign, explained, residuals)


def eigenvector_axes(pairs: Eigenpairs, *indices: int) -> Axes:
    """The eigenvectors of `eigenpairs(..., vectors=True)` as axes, named by their eigenvalues; some of them by index.

    Raises ValueError where the vectors were not asked for.

    >>> from funcscope.core.keys import key
    >>> from funcscope.linalg import eigenpairs
    >>> scale = torch.tensor([3.0, 2.0, 1.0])
    >>> eigenvector_axes(eigenpairs(lambda v: scale * v, scale, key=key(0), num=2, vectors=True)).names
    ('eigenvalue 3', 'eigenvalue 2')
    """
    check_instance("pairs", pairs, Eigenpairs, "`eigenpairs(matvec, theta, key=fs.key(0), num=2, vectors=True)`")
    if pairs.vectors is None:
        raise ValueError("`pairs` has no vectors: pass `vectors=True` to `eigenpairs`.")
    chosen = list(indices) or list(range(len(pairs.values)))
    values, residuals = pairs.values[chosen].tolist(), pairs.residuals[chosen].tolist()
    names = tuple(f"eigenvalue {value:.4g}" for value in values)
    return Axes(pairs.vectors[chosen], names, "eigenvectors", {"eigenvalues": values, "residuals": residuals})


def project(
    thetas: Float[Tensor, "m p"] | Sequence[Tensor], origin: Float[Tensor, " p"], axes: Axes | Float[Tensor, "k p"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " m"]]:
    r"""Coordinates of points on the plane through `origin` that the axes span, and their distances from it; float64.

    $$c = (V V^\top)^{-1} V (\theta - \theta_0), \qquad r = \|\theta - \theta_0 - V^\top c\|.$$

    The axes need be neither orthogonal nor of norm 1: $\theta_0 + V^\top c$ is the closest point of the plane.

    Raises ValueError for shapes that do not fit and for axes that are linearly dependent.

    >>> project(torch.tensor([[3.0, 4.0, 5.0]]), torch.zeros(3), torch.eye(3)[:2] * 2)
    (tensor([[1.5000, 2.0000]], dtype=torch.float64), tensor([5.], dtype=torch.float64))
    """
    points, origin = _stacked(thetas), origin.detach()
    vectors = axes.vectors if isinstance(axes, Axes) else axes
    if not points.ndim == vectors.ndim == 2 or not points.shape[1] == vectors.shape[1] == len(origin):
        raise ValueError(
            f"points (m, p), origin (p,) and axes (k, p) must belong to one model, got shapes {tuple(points.shape)}, "
            f"{tuple(origin.shape)} and {tuple(vectors.shape)}."
        )
    inner = torch.stack([x @ v.T for x, v in zip(blocks(points, origin), blocks(vectors), strict=True)]).sum(0)
    square = gram(vectors)
    scale = square.diagonal().sqrt()
    if not bool(scale.all()) or float(torch.linalg.eigvalsh(square / (scale[:, None] * scale))[0]) < 1e-12:
        raise ValueError("the axes are linearly dependent: coordinates along them are not unique.")
    coordinates = torch.linalg.solve(square, inner.T).T
    beside = (x - coordinates @ v for x, v in zip(blocks(points, origin), blocks(vectors), strict=True))
    squares = torch.stack([part.square().sum(1) for part in beside]).sum(0)
    return coordinates.cpu(), squares.sqrt().cpu()


def _combined(points: Tensor, origin: Tensor, weights: Tensor) -> Tensor:
    """Orthonormal combinations of the differences, in the dtype of the points."""
    wide = torch.cat([weights.T @ part for part in blocks(points, origin)], 1)
    return orthonormalise(wide).to(points.dtype)


def _stacked(thetas: Any) -> Tensor:
    """Points as rows of a matrix, cut off from any graph."""
    check_instance("thetas", thetas, Iterable, "flat vectors, one per point, `[net.theta, ...]`")
    if not isinstance(thetas, Tensor) and not all(isinstance(theta, Tensor) for theta in thetas):
        raise TypeError("`thetas` must hold flat vectors: parameter dicts become such with `net.layout.ravel(params)`.")
    floating = thetas.is_floating_point() if isinstance(thetas, Tensor) else all(x.is_floating_point() for x in thetas)
    if not floating:
        raise TypeError("`thetas` must hold floating-point numbers.")
    if isinstance(thetas, Tensor):
        return thetas.detach()
    shapes = {tuple(theta.shape) for theta in thetas}
    if len(shapes) != 1:
        raise ValueError(f"`thetas` must be flat vectors of one length, got shapes {sorted(shapes)}.")
    return torch.stack([theta.detach() for theta in thetas])
