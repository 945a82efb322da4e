"""What a point of a loss landscape costs beside a bare forward pass, landscaper and loss-landscapes, in one run.

    python bench/landscape.py [--sections points plane flatness memory] [--sizes 0.1M 14M llama-13M]
                              [--threads N] [--rounds N] [--full] [--json FILE]

points: the whole of a plane (15 x 15 points; Llama 9 x 9), by `loss_plane`, by the peers and by a plain loop that writes
all weights in place, each way in turn in every round, between bare passes of the untouched model with its loss and no
gradient. `forwards`: passes per point, the two at theta itself included; `whole`: with the set-up, which is model to
function and the directions of one plane, spread over its points. Before anything is timed, each peer's losses are compared
with ours at the same points (`differs`, relative), and what is wrong in a peer's numbers is printed. landscaper walks to
every point from the centre, step by step: it takes longer on larger grids.
plane: 25 x 25 points of the demo's model over its p^2 grid in three batches.
flatness: 50 directions at checkpoints of the demo's model over its p^2 grid, beside the documented loop (one copy of the
state dict, per direction one draw, load, forward, load; losses from a float64 log-softmax), extrapolated to 100 checkpoints
(--full: all run); then the variance that pairs and common directions save at equal evaluations: of the mean change at one
checkpoint, of its difference between one checkpoint and the next.
Where the gradient on the whole grid is large, pairs save most; where it vanishes, they may bring as little as one half.
memory, at 14M: growth of the resident set while a plane of 3 x 3 points is set up and evaluated, in a process of its own.

How the peers are called, and where their points lie, is said in landscape_peers.py; install_peers.sh installs them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import landscape_peers as peers
import torch
from cases import grown, seconds_of
from landscape_peers import SPAN, Plane, Way
from tabulate import tabulate
from torch import Tensor, nn

import funcscope as fs
from funcscope.families import modular
from funcscope.landscape.axes import plane_directions
from funcscope.landscape.flatness import flatness
from funcscope.landscape.planes import loss_plane
from funcscope.landscape.sampling import common_directions

CUTS = {"0.1M": ((4, 16), (2, 32), (4, 32), (4, 64)), "14M": ((4, 64),), "llama-13M": ((4, 64),)}
"""Rows and tokens of the batches of each size."""
ASKED = {"14M": 1.1, "0.1M": 1.05}
NUM = {"0.1M": 15, "14M": 15, "llama-13M": 9}
CHECKPOINTS = (0, 20, 60, 300, 3000)


def points(args: argparse.Namespace) -> list[dict]:
    rows, said = [], []
    for size in args.sizes:
        for cut in CUTS[size]:
            rows += point_rows(size, cut, args, said if cut == CUTS[size][-1] else [])
    show(
        "Planes, as multiples of a bare forward pass per point", rows,
        forwards=".3f", whole=".3f", ms=".2f", setup_ms=".0f", differs=".1e",
    )  # fmt: skip
    print(*said, sep="\n", flush=True)
    return [*rows, {"notes": said}]


def point_rows(size: str, cut: tuple[int, int], args: argparse.Namespace, said: list[str]) -> list[dict]:
    differs = compared(Plane(size, cut, 5 if size == "0.1M" else 3), args.peers, said)
    plane = Plane(size, cut, NUM[size])
    ways, failed = peers.runnable(plane, plane.ways(args.peers))
    said += [f"{size}: {name} raises {why}" for name, why in failed.items()]
    points, each = plane.num**2, max(3, plane.num**2 // 10)
    rounds = args.rounds if size == "0.1M" else min(args.rounds, 3)
    bare: list[float] = []
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            bare += [seconds_of(plane.bare)[0] for _ in range(each)]
            taken[name].append(peers.timed(plane, way))
    unit = statistics.median(bare)
    head = {"size": size, "tokens": f"{cut[0]} x {cut[1]}", "points": points}
    rows = [head | {"way": "bare forward", "ms": 1e3 * unit, "forwards": 1.0}]
    for name, pairs in taken.items():
        first, later = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append(head | {"way": name, "ms": 1e3 * later / points, "forwards": later / points / unit})
        rows[-1] |= {"whole": (first + later) / points / unit, "setup_ms": 1e3 * first, "differs": differs.get(name)}
    rows[1]["asked"] = ASKED.get(size)  # of ours, without set-up
    found = ", ".join(f"{row['way']} {row['forwards']:.3f}" for row in rows)
    print(f"  {size} {cut[0]} x {cut[1]}: {found}", file=sys.stderr)
    return rows


def compared(plane: Plane, names: set[str], said: list[str]) -> dict[str, float]:
    """Largest relative difference between a peer's losses and ours at the same points; raises above 1e-4."""
    size, num, model = plane.case.size, plane.num, plane.model
    net = fs.functional(model)
    loss = fs.objective(net, {"input_ids": plane.ids}, fs.causal_lm)
    axes = plane_directions(net, key=fs.key(0))
    dirs = [peers.parts_of(net, row) for row in axes.vectors]

    def ours(steps: list[peers.Parts], num: int, chunk: int | None = None) -> Tensor:
        rows = torch.stack([peers.flat(net, parts) for parts in steps])
        return loss_plane(loss, net.params, rows, num=num, span=(num - 1) / 2, chunk=chunk).grid_losses

    def off(theirs: Any, wanted: Tensor) -> Tensor:
        return ((torch.as_tensor(theirs) - wanted) / wanted).abs()

    wanted = loss_plane(loss, net.params, axes, num=num, span=SPAN).grid_losses
    looped = peers.plane_by_loop(model, plane.scalar, dirs, fs.grid(num, span=SPAN)).view(num, num)
    found = {"plain loop": float(off(looped, wanted).max())}
    found |= {
        f"funcscope, chunk={n}": float(
            off(loss_plane(loss, net.params, axes, num=num, chunk=n).grid_losses, wanted).max()
        )
        for n in ((1, 8) if size == "0.1M" else ())
    }
    if "landscaper" in names:
        difference = off(
            peers.plane_by_landscaper(model, plane.scalar, dirs, num, SPAN),
            ours(peers.steps_of_landscaper(model, dirs, num, SPAN), num),
        ).flatten()
        at = int(difference.argmax())  # random noise is added to the largest loss
        found["landscaper"] = float(torch.cat([difference[:at], difference[at + 1 :]]).max())
        own = plane.landscaper().setup()
        said += [
            f"{size}: landscaper's largest loss is off by {float(difference[at]):.1e}, noise that it adds; its points reach "
            f"{num // 2 / (num / 2):.3f} of the coordinates that it returns ({num} x {num}); the two directions of its "
            f"`generate_random_orthogonal_directions` have a cosine of {peers.cosine(*own):+.4f}."
        ]
    for kind in ("layer", "filter") if "loss-landscapes" in names else ():
        way = plane.loss_landscapes(kind)
        try:
            steps = way.setup()
        except ZeroDivisionError:
            continue
        square, theirs = ours(steps, num + 1), way.run(None)
        found[f"loss-landscapes, {kind}"] = float(off(theirs, peers.where_loss_landscapes(square)).max())
        shift = off(theirs, peers.where_loss_landscapes(square, shifted=False)).max()
        said += [
            f"{size}: loss-landscapes, {kind}: odd rows lie one step beside even ones, up to {float(shift):.1e} of the "
            f"loss; its directions have a cosine of {peers.cosine(*steps):+.4f}, and {positive(steps[0]):.0%} of the "
            "entries of the first are positive."
        ]
    wrong = {name: by for name, by in found.items() if not by < 1e-4}
    assert not wrong, f"these losses differ from ours: {wrong}"
    return found


def positive(parts: peers.Parts) -> float:
    return sum(int((part > 0).sum()) for part in parts) / sum(int((part != 0).sum()) for part in parts)


class AllPositions(modular.ModularAddition):
    """The same function as the documented system's model computes it: all three positions through all of the block."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + self.mlp_out(self.mlp_in(x).relu())
        return self.unembed(x)[:, -1]


class Grid:
    """The demo's model over its p^2 grid."""

    def __init__(self, num_batches: int = 1, make: Callable[[modular.Config], nn.Module] = modular.ModularAddition):
        self.config = modular.Config()
        self.model = make(self.config)
        self.model.load_state_dict(modular.make(self.config).state_dict())
        self.net = fs.functional(self.model)
        tokens, answers = modular.data(self.config, "probe")
        rows = -(-len(tokens) // num_batches)
        self.batches = list(zip(tokens.split(rows), answers.split(rows), strict=True))
        self.loss = fs.objective(self.net, self.batches, modular.CRITERION)

    @torch.no_grad()
    def scalar(self, model: nn.Module) -> float:
        """Mean cross-entropy of a float64 log-softmax."""
        total = 0.0
        for tokens, answers in self.batches:
            logp = model(tokens).double().log_softmax(-1)
            total -= float(logp.gather(1, answers[:, None]).sum())
        return total / sum(len(answers) for _, answers in self.batches)


def plane(args: argparse.Namespace) -> list[dict]:
    grid, num = Grid(num_batches=3), args.num

    def loop() -> Tensor:
        dirs = [peers.parts_of(grid.net, row) for row in plane_directions(grid.net, key=fs.key(0)).vectors]
        return peers.plane_by_loop(grid.model, grid.scalar, dirs, fs.grid(num, span=SPAN))

    def ours() -> Tensor:
        return loss_plane(grid.loss, grid.net.params, plane_directions(grid.net, key=fs.key(0)), num=num).grid_losses

    def landscaper() -> Any:
        with peers.seeded(0):
            dirs = peers.landscaper().utils.generate_random_orthogonal_directions(grid.model, 2)
        return peers.plane_by_landscaper(grid.model, grid.scalar, dirs, num, SPAN)

    ways = {"funcscope": ours, "plain loop": loop} | ({"landscaper": landscaper} if "landscaper" in args.peers else {})
    taken: dict[str, list[float]] = {name: [] for name in ("bare", *ways)}
    found = {}
    for turn in range(3):
        taken["bare"] += [seconds_of(lambda: grid.scalar(grid.model))[0] for _ in range(20)]
        for name, way in ways.items() if turn else {"funcscope": ways["funcscope"]}.items():
            seconds, found[name] = seconds_of(way)
            taken[name].append(seconds)
    differs = float((found["funcscope"].flatten() / found["plain loop"] - 1).abs().max())
    assert differs < 1e-5, f"the plain loop's losses differ from ours by {differs}"
    unit = statistics.median(taken.pop("bare"))
    rows = [
        {"way": name, "seconds": statistics.median(seconds), "forwards": statistics.median(seconds) / num**2 / unit}
        for name, seconds in taken.items()
    ]
    rows[0] |= {"asked": 20.0, "differs": differs}
    show(f"{num} x {num} points of the demo's model, {unit * 1e3:.1f} ms each when bare", rows,
         seconds=".2f", forwards=".2f", differs=".1e")  # fmt: skip
    return [{"bare_ms": 1e3 * unit, "points": num**2, **row} for row in rows]


def documented(grid: Grid, num: int, epsilon: float, directions: Tensor | None = None) -> tuple[float, list[float]]:
    """The document's loop over the grid's model as it is; with unit `directions` instead of its own draws to compare."""
    baseline, deltas = grid.scalar(grid.model), []
    original = {name: value.clone() for name, value in grid.model.state_dict().items()}
    names = [name for name, _ in grid.model.named_parameters()]
    generator = torch.Generator().manual_seed(0)
    for i in range(num):
        if directions is None:
            drawn = {name: torch.randn(original[name].shape, generator=generator) for name in names}
            size = torch.sqrt(sum((x**2).sum() for x in drawn.values()))
            drawn = {name: x / size for name, x in drawn.items()}
        else:
            drawn = grid.net.layout.unravel(directions[i])
        moved = {name: value + epsilon * drawn[name] if name in drawn else value for name, value in original.items()}
        grid.model.load_state_dict(moved)
        deltas.append(grid.scalar(grid.model) - baseline)
        grid.model.load_state_dict(original)
    return baseline, deltas


def trained() -> list[dict[str, Tensor]]:
    """Checkpoints of the demo's run: the start, memorising, memorised, and generalising."""
    config = modular.Config()
    with tempfile.TemporaryDirectory() as folder:
        for _ in modular.train(config, Path(folder), CHECKPOINTS):
            pass
        return [modular.checkpoint(config, Path(folder), step).params for step in CHECKPOINTS]


def flatness_section(args: argparse.Namespace) -> list[dict]:
    grid, key, num, epsilon = Grid(), fs.key(0), 50, 0.1
    weights = trained()
    drawing, common = seconds_of(lambda: common_directions(grid.net, key=key, num=num))
    agree(grid, weights[-1], common, epsilon)
    once = {"key": key, "n_directions": num, "epsilon": epsilon}
    kept = once | {"directions": common}
    whole = Grid(make=AllPositions)
    ways: dict[str, tuple[Callable[[dict[str, Tensor]], Any], int, float]] = {
        "the document's loop, 50 at +d": (lambda _: documented(grid, num, epsilon), 51, 0.0),
        "the same, all positions computed": (lambda _: documented(whole, num, epsilon), 51, 0.0),
        "funcscope, 50 at +d, drawn anew": (lambda w: flatness(grid.loss, w, two_sided=False, **once), 52, 0.0),
        "funcscope, 50 at +d, common": (lambda w: flatness(grid.loss, w, two_sided=False, **kept), 52, drawing),
        "funcscope, 50 pairs, common": (lambda w: flatness(grid.loss, w, **kept), 102, drawing),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    bare: list[float] = []
    times = 100 // len(weights) if args.full else 1
    for turn in range(-1, len(weights) * times):
        params = weights[turn % len(weights)]
        for each in (grid, whole):
            each.model.load_state_dict(params)
        bare += [seconds_of(lambda: grid.scalar(grid.model))[0] for _ in range(5)]
        for name, (way, _, _) in ways.items():
            seconds, _ = seconds_of(partial(way, params))
            taken[name] += [seconds] if turn >= 0 else []  # the first is not counted
    unit, first = statistics.median(bare), statistics.median(taken["the document's loop, 50 at +d"])
    rows = []
    for name, (_, evaluations, extra) in ways.items():
        each = statistics.median(taken[name])
        total = sum(taken[name]) + extra if args.full else 100 * each + extra
        rows.append({"way": name, "evaluations": evaluations, "ms": 1e3 * each, "forwards": each / evaluations / unit})
        rows[-1] |= {"by_document": each / first, "seconds_100": total, "run": len(taken[name])}
    title = f"Flatness at a checkpoint of the demo's model, {unit * 1e3:.1f} ms a bare pass; 100 checkpoints"
    title += "" if args.full else ", extrapolated"
    show(title, rows, ms=".0f", forwards=".2f", by_document=".2f", seconds_100=".1f")
    saved = variances(grid, weights, epsilon, args.pairs)
    show(f"How many times smaller the variance is than that of one-sided, independent directions, {args.pairs} pairs", saved,
         mean=".3g", mean_stderr=".1g", pairs=".2f", pairs_stderr=".2f", common=".1f", both=".1f")  # fmt: skip
    return [{"bare_ms": 1e3 * unit, **row} for row in rows] + saved


def agree(grid: Grid, params: dict[str, Tensor], common: Any, epsilon: float) -> None:
    """The loop's loss changes and ours, along the same directions."""
    grid.model.load_state_dict(params)
    num = 5
    _, theirs = documented(grid, num, epsilon, common.rows)
    result = flatness(grid.loss, params, key=common.key, n_directions=num, epsilon=epsilon, directions=common)
    differs = (
        float((result.delta_losses - torch.tensor(theirs, dtype=torch.float64)).abs().max()) / result.baseline_loss
    )
    print(f"flatness: the document's changes of the loss differ from ours by {differs:.1e} of the loss", flush=True)
    assert differs < 1e-5, "the document's loop and ours differ along the same directions"


def variances(grid: Grid, weights: list[dict[str, Tensor]], epsilon: float, num: int) -> list[dict]:
    """How many times smaller the variance of the mean change gets, at equal evaluations.

    pairs: at one checkpoint. common, both: of the difference to the checkpoint before, on the same directions, one-sided
    and in pairs, beside one-sided samples of directions of their own.
    """
    rows, before = [], None
    common = common_directions(grid.net, key=fs.key(1), num=num)
    for step, params in zip(CHECKPOINTS, weights, strict=True):
        now = flatness(grid.loss, params, key=fs.key(1), n_directions=num, epsilon=epsilon, directions=common)
        rows.append({"step": step, "loss": f"{now.baseline_loss:.3g}"})
        for name, estimate in (("mean", now.estimates["mean_delta_loss"]), ("pairs", now.pair_variance_ratio)):
            rows[-1] |= {name: float(estimate.value), f"{name}_stderr": float(estimate.stderr)}
        if before is not None:
            apart = before.delta_losses.var() + now.delta_losses.var()
            together = (now.delta_losses - before.delta_losses).var()
            paired = 2 * (now.even - before.even).var()  # two evaluations each
            rows[-1] |= {"common": float(apart / together), "both": float(apart / paired)}
        before = now
    return rows


def memory(args: argparse.Namespace) -> list[dict]:
    """Peaks in processes of their own."""
    names = [name for name in Plane("14M", (4, 64), 3).ways(args.peers) if "filter" not in name]
    peaks = {name: peak_in_a_process(name) for name in ("bare forward", *names)}
    weights = sum(p.numel() for p in Plane("14M", (4, 64), 3).model.parameters()) * 4 / 2**20
    rows = [
        {"way": name, "peak_mib": peak, "over_bare_mib": peak - peaks["bare forward"], "weights": peak / weights}
        for name, peak in peaks.items()
    ]
    show(f"Growth of the resident set at 14M, whose weights are {weights:.0f} MiB", rows,
         peak_mib=".0f", over_bare_mib=".0f", weights=".1f")  # fmt: skip
    return rows


def peak_in_a_process(way: str) -> float:
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--peak", way]
    handed_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=handed_back)
    return float(done.stdout.split()[-1])


def peak_mib(way: str) -> float:
    """In this process; a small model goes first, for all that torch loads when it is first used."""
    for size in ("1.5k", "14M"):
        plane = Plane(size, (4, 64), 3)
        plane.bare()
        made = plane.ways(peers.installed()).get(way, Way(lambda: None, lambda _, plane=plane: plane.bare()))
        peak = grown(lambda made=made: made.run(None if made.includes else made.setup()))
    return peak


def show(title: str, rows: list[dict], **formats: str) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [["" if row.get(x) is None else format(row[x], formats.get(x, "")) for x in names] for row in rows]
    print(f"\n{title}\n{tabulate(cells, headers=names, disable_numparse=True)}", flush=True)


SECTIONS = {"points": points, "plane": plane, "flatness": flatness_section, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--sizes", nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="of the points (3 at most for the larger models)")
    parser.add_argument("--num", type=int, default=25, help="points along an axis of the demo's plane")
    parser.add_argument("--pairs", type=int, default=100, help="directions for the variances")
    parser.add_argument("--full", action="store_true", help="flatness at 100 checkpoints, none extrapolated")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "landscape.json")
    parser.add_argument("--peak", metavar="WAY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    if args.peak:
        print(peak_mib(args.peak))
        return
    args.peers = peers.installed()
    for name in peers.PACKAGES.keys() - args.peers:
        print(f"{name} is left out: not installed; `sh bench/install_peers.sh VENV` installs it.")
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", *sorted(args.peers)))
    print(f"{args.threads} threads, {versions}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for section in args.sections:
        rows = SECTIONS[section](args)
        report = json.loads(args.json.read_text()) if args.json.exists() else {}
        machine = platform.processor() or platform.machine()
        report[section] = {"threads": args.threads, "machine": machine, "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1))  # other sections stay as they were measured before


if __name__ == "__main__":
    main()
