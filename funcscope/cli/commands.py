"""The commands that measure, as data: each is a list of metrics and the settings that have an option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ..study import presets
from ..study.presets import Preset
from ..study.texts import Usual
from .options import Flag

_DRAWS = {
    "samples": Flag(["directional_losses.n_samples"], "random directions"),
    "span": Flag(["directional_losses.span"], "step along each direction"),
    "normalize": Flag(["directional_losses.normalize"], "scale of the directions"),
    "distribution": Flag(["directional_losses.distribution"], "draws"),
    "curvature": Flag(["directional_losses.curvature"], "difference, or exact: no step is taken"),
    "slopes": Flag(["directional_losses.slopes"], "slopes along the directions"),
}
_SPECTRA = ("hessian_eigenvalues", "hessian_eigenvalue_errors", "hessian_block_eigenvalues")


class Command(NamedTuple):
    """A command that measures models."""

    name: str
    help: str
    description: str
    models: Literal["MODEL", "A B", "MODEL..."]
    preset: Preset
    flags: Mapping[str, Flag] = {}
    fields: Mapping[str, Any] = {}
    """Fields of the configuration that have another default here."""


COMMANDS = (
    Command(
        "directional",
        "losses, slopes and curvatures of your own model along random directions",
        "Samples the loss along random directions on both sides.",
        "MODEL",
        presets.DIRECTIONAL,
        _DRAWS,
    ),
    Command(
        "curvature",
        "spectrum of the Hessian, trace, curvature of every block and sharpness of your own model",
        "Finds both ends of the spectrum of the Hessian (or the Gauss-Newton matrix) with their errors over texts, its "
        "density, its trace and those of its blocks, and measures sharpness. Every product with the matrix costs 4 to 6 "
        "forward passes over all texts, and there are some 700: fewer texts, --probes or --steps make it shorter.",
        "MODEL",
        presets.CURVATURE,
        {
            "matrix": Flag([f"{each}.matrix" for each in _SPECTRA], "hessian, or ggn: the Gauss-Newton matrix"),
            "num": Flag(["hessian_eigenvalues.num"], "eigenvalues from each end"),
            "tol": Flag([f"{each}.tol" for each in _SPECTRA], "residual, relative to the largest |eigenvalue|"),
            "probes": Flag(["hessian_eigenvalues.num_probes"], "random starts of the density"),
            "steps": Flag(["hessian_eigenvalues.steps"], "products per start"),
            "trace_products": Flag(["hessian_eigenvalues.trace_matvecs"], "products for the trace"),
            "by": Flag(["hessian_block_traces.by", "hessian_block_eigenvalues.by"], "a block: layer, module, tensor"),
            "block_products": Flag(["hessian_block_traces.num"], "products for the traces of blocks"),
            "epsilon": Flag(["sam_sharpness.epsilon"], "radius of SAM's ball, a distance"),
            "keep": Flag([f"{each}.keep" for each in _SPECTRA], "keep the graph: faster, more memory"),
        },
        {"num_samples": 16, "max_seq_length": Usual(64)},
    ),
    Command(
        "landscape",
        "the loss of your own model on a plane and on lines, and how flat it is",
        "Evaluates the loss on a plane of two random directions and along lines, and measures flatness.",
        "MODEL",
        presets.LANDSCAPE,
        {
            "points": Flag(["loss_landscape_2d.n_points"], "of the plane, along each side"),
            "span": Flag(["loss_landscape_2d.span", "loss_lines.span"], "how far to each side"),
            "normalization": Flag(["loss_landscape_2d.normalization"], "scale of the directions"),
            "lines": Flag(["loss_lines.num_directions"], "random lines"),
            "epsilon": Flag(["landscape_flatness.epsilon"], "the step of flatness, a distance"),
            "directions": Flag(["landscape_flatness.n_directions"], "directions of flatness"),
        },
    ),
    Command(
        "path",
        "the loss on the line between two models: how high is the barrier?",
        "Evaluates the loss on the straight line between two models of one shape.",
        "A B",
        presets.PATH,
        {"points": Flag(["linear_path.num"], "on the line, both ends among them")},
    ),
    Command(
        "compare",
        "models against a first one, along the same random directions, with paired errors",
        "Samples every model along the same random directions, and tests the paired differences to the first.",
        "MODEL...",
        presets.COMPARISON,
        _DRAWS,
    ),
)
