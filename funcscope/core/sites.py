"""The sites of a forward pass: their names and axes, which of them a model has, and what stands in the place of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import torch
from torch import Tensor, nn

from .anatomy import ANATOMIES, body_of

STREAM, HEADS, SCORES = (
    ("batch", "position", "unit"),
    ("batch", "position", "head", "unit"),
    ("batch", "head", "query", "key"),
)
AXES: dict[str, tuple[str, ...]] = {
    "tok_embed": STREAM, "pos_embed": STREAM, "resid_pre": STREAM, "attn_in": STREAM, "q": HEADS, "k": HEADS,
    "v": HEADS, "rot_q": HEADS, "rot_k": HEADS, "scores": SCORES, "pattern": SCORES, "z": HEADS, "result": HEADS,
    "attn_out": STREAM, "resid_mid": STREAM, "mlp_in": STREAM, "mlp_pre": STREAM, "mlp_post": STREAM, "mlp_out": STREAM,
    "resid_post": STREAM, "final_scale": ("batch", "position"), "final": STREAM, "logits": STREAM,
}  # fmt: skip
"""Every kind of site with its axes, in the order of a pass.

Of the whole model: `tok_embed`, `pos_embed`, `final_scale` (what the final norm divides by), `final` (its output), `logits`.
Of a layer: the residual stream before, between and behind its parts (`resid_pre`, `resid_mid`, `resid_post`), what attention
reads (`attn_in`), `q` and `k` before and `rot_q` and `rot_k` after rotation, `v`, `scores` (scaled and capped, masked to the
lowest number), `pattern`, the heads' outputs before and after the output matrix (`z`, `result`), what attention writes
(`attn_out`), what the MLP reads (`mlp_in`), its units before and after the nonlinearity (`mlp_pre`; `mlp_post`, with gate),
and what it writes (`mlp_out`).
"""
ONCE = ("tok_embed", "pos_embed", "final_scale", "final", "logits")
MADE = ("result", "final_scale")
"""Made of other sites, so that nothing reads them."""


Places = int | np.integer | Sequence[int] | slice | Tensor | None


@dataclass(frozen=True)
class Patch:
    """What stands in the place of a part of a site: of some batch rows, positions, heads or units.

    value: a number, a tensor that can be expanded to the site, or a function of the site's value. rows and the others: a
    place, several, or a slice; positions are those of queries, for patterns.
    """

    value: float | Tensor | Callable[[Tensor], Tensor]
    rows: Places = None
    positions: Places = None
    heads: Places = None
    units: Places = None

    def of(self, x: Tensor, axes: Sequence[str]) -> Tensor:
        """The site with that part replaced."""
        place = "query" if "query" in axes else "position"
        chosen = {"batch": self.rows, place: self.positions, "head": self.heads, "unit": self.units}
        inside = torch.ones((1,) * x.ndim, dtype=torch.bool, device=x.device)
        for axis, places in chosen.items():
            if places is None:
                continue
            if axis not in axes:
                per = f"it is per {', '.join(axes)}" if axes else "the axes of a module's output are not known"
                raise ValueError(f"the site has no {axis} to choose from: {per}.")
            at, size = axes.index(axis), x.shape[axes.index(axis)]
            wanted = (
                np.arange(size)[places].ravel().tolist() if isinstance(places, slice) else np.ravel(places).tolist()
            )
            if bad := [each for each in wanted if not -size <= each < size]:
                raise ValueError(f"there is no {axis} {bad[0]}: the site has {size}.")
            there = torch.zeros(size, dtype=torch.bool, device=x.device)
            there[wanted] = True
            inside = inside & there.view([size if i == at else 1 for i in range(x.ndim)])
        new = self.value(x) if callable(self.value) else torch.as_tensor(self.value, device=x.device).to(x.dtype)
        if not isinstance(new, Tensor) or not _expands(new, x):
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"the value of a `Patch` must expand to the site's shape {tuple(x.shape)}, got {got}.")
        return torch.where(inside, new, x)


def _expands(new: Tensor, x: Tensor) -> bool:
    sizes = zip(new.shape[::-1], x.shape[::-1], strict=False)
    return new.ndim <= x.ndim and all(own in (1, size) for own, size in sizes)


Edit = Tensor | Callable[[Tensor], Tensor] | Patch


def sites_of(model: nn.Module) -> list[str]:
    """All sites of a model by name, in the order of a pass; modules where its family is not described."""
    body = body_of(model)
    if body is None:
        return [f"module:{name}" for name, _ in model.named_modules() if name]
    rotated, a = bool(body.anatomy.query), body.anatomy
    absent = {
        "pos_embed": not a.positions, "rot_q": not rotated, "rot_k": not rotated, "attn_in": not a.attn_in,
        "mlp_in": not a.mlp_in, "final": not a.final, "final_scale": not a.final, "resid_mid": body.norm == "parallel",
    }  # fmt: skip
    there = [name for name in AXES if not absent.get(name)]
    of_layers = [f"{name}.{i}" for i in range(len(body.blocks)) for name in there if name not in ONCE]
    first = [name for name in there if name in ("tok_embed", "pos_embed")]
    return [*first, *of_layers, *(name for name in there if name in ONCE and name not in first)]


def edited(name: str, value: Tensor, edit: Edit) -> Tensor:
    """What stands in the place of a site's value. Raises ValueError for another shape."""
    if isinstance(edit, Patch):
        new = edit.of(value, AXES.get(name.partition(".")[0], ()))
    else:
        new = edit(value) if callable(edit) else edit
    if not isinstance(new, Tensor):
        raise TypeError(
            f"what replaces `{name}` must be a tensor, a function that gives one, or a `Patch`, got a {type(new).__name__}."
        )
    if new.shape != value.shape:
        raise ValueError(f"what replaces `{name}` must have its shape {tuple(value.shape)}, got {tuple(new.shape)}.")
    return new.to(value.dtype)


def spread(sites: Iterable[str], known: Sequence[str]) -> Iterator[str]:
    """Single sites; a kind is that of all layers."""
    check_sites(sites)
    for name in sites:
        layers = [each for each in known if each.rpartition(".")[0] == name and not each.startswith("module:")]
        if not layers:
            check_known(name, known)
        yield from layers or [name]


def check_sites(sites: object) -> None:
    """Names, and not the letters of one."""
    if isinstance(sites, str):
        raise ValueError(f"`sites` must be a list of names, got the text {sites!r}: [{sites!r}].")


def check_known(name: str, known: Sequence[str]) -> None:
    """Raises ValueError for a site that is not there, with the nearest that is."""
    if name in known or name.startswith("module:"):
        return
    if not any(each in known for each in ONCE):
        raise ValueError(
            f"there is no site {name!r}: the parts of this model are not described (those of {', '.join(sorted(ANATOMIES))} "
            "are). The outputs of its modules can be seen and replaced, `module:NAME`."
        )
    if f"{name}.0" in known:
        raise ValueError(f"{name!r} are sites of all layers, and a replaced one is that of one: `{name}.0`.")
    raise ValueError(f"there is no site {name!r}{nearest(name, known)}")


def _translated(name: str) -> str:
    """The site of a name that TransformerLens gives it."""
    hook = re.fullmatch(r"(?:blocks\.(\d+)\.)?(?:(\w+)\.)?hook_(\w+)", name)
    if hook is None:
        return ""
    layer, part, kind = hook.groups()
    norms = {"ln1": "attn_in", "ln2": "mlp_in", "ln_final": "final"}
    names = {
        "attn_scores": "scores",
        "pre": "mlp_pre",
        "post": "mlp_post",
        "embed": "tok_embed",
        "scale": "final_scale",
    }
    kind = norms.get(part, "") if kind == "normalized" else names.get(kind, kind)
    return kind if layer is None else f"{kind}.{layer}"


def nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = [each for each in [_translated(name)] if each in known] or get_close_matches(name, known, 3)
    return (
        f": did you mean {' or '.join(map(repr, near))}?" if near else ": `sites_of(net)` names those that are there."
    )
