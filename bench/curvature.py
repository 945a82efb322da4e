"""What curvature costs beside a bare forward pass and beside curvlinops, hessian-eigenthings and PyHessian, in one run.

    python bench/curvature.py [--sections products eigen density trace memory] [--sizes 0.1M 14M llama-13M]
                              [--threads N] [--rounds N] [--probes N] [--json FILE]

products: one Hessian and one Gauss-Newton product, each way in turn in every round; medians, as multiples of a forward
pass of the untouched model with its loss and no gradient. Set-up is what the first product takes beyond a later one. The
products of all ways are compared before anything is timed.
eigen: the five eigenvalues of largest magnitude of a model trained for some steps, until every true residual
|Ay - theta y|, by one clean product each, is at most 1e-3 |theta_1|; set-up included. curvlinops: `eigsh` with the number
of vectors that is cheapest for it; hessian-eigenthings: the least number of its Lanczos steps that gets there (what it takes
to find these settings is not timed); PyHessian: its power iteration, capped.
density: stochastic Lanczos quadrature of 40 steps per probe, and the trace that it implies.
trace: error of XTrace and Hutchinson over many keys at equal products, on a dense matrix whose trace is known.
memory, at 14M: growth of the resident set while one product is set up and taken, in a process of its own in which large
blocks go back to the system when they are freed; and what chunks of the readout save at a vocabulary of 50,304.

How the peers are set, and what they needed, is said in peers.py; install_peers.sh installs them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import peers
import torch
from cases import Case, grown, milliseconds, seconds_of
from peers import Pairs, ways_of
from tabulate import tabulate
from torch import Tensor

import funcscope as fs

TRAINED = 60
RESIDUAL = 1e-3
STEPS = 40
BARE = ("", "bare forward")


def warm(args: argparse.Namespace) -> None:
    """What torch and the peers load on first use is no one's set-up."""
    small = Case("1.5k")
    for make in ways_of(small, args.peers).values():
        make()(torch.randn_like(small.theta))


def product_rows(size: str, args: argparse.Namespace, rounds: int, chunked: bool = False) -> list[dict]:
    """Set up, compare and time every way of one size; the first way of an operator is what the others are compared with."""
    warm(args)
    case = Case(size)
    v = fs.normal(fs.key(0), case.theta)
    calls, first, answers = {BARE: case.bare}, {}, {}
    for name, make in ways_of(case, args.peers, chunked).items():
        start = time.perf_counter()
        product = make()
        answers[name] = product(v).detach()
        first[name] = 1e3 * (time.perf_counter() - start)
        calls[name] = lambda product=product: product(v)
    reference = {kind: answers[kind, way] for kind, way in reversed(answers)}
    differs = {name: float((answer - reference[name[0]]).norm() / answer.norm()) for name, answer in answers.items()}
    wrong = {name: by for name, by in differs.items() if not by < 1e-3 and "fused" not in name[1]}
    assert not wrong, f"these products differ from ours: {wrong}"
    ms = milliseconds(calls, args.threads, rounds, 5 if size == "0.1M" else 1)
    return [
        {"size": size, "operator": name[0], "way": name[1], "ms": ms[name], "forwards": ms[name] / ms[BARE]}
        | ({"setup_ms": max(0.0, first[name] - ms[name]), "differs": differs[name]} if name in first else {})
        for name in ms
    ]


def products(args: argparse.Namespace) -> list[dict]:
    rows = [row for size in args.sizes for row in product_rows(size, args, args.rounds)]
    show("Products, as multiples of a bare forward pass", rows, forwards=".2f", ms=".1f", setup_ms=".0f", differs=".1e")
    return rows


def eigen(args: argparse.Namespace) -> list[dict]:
    rows = [row for size in args.sizes if size != "llama-13M" for row in eigen_rows(size, args)]
    show("Five eigenvalues of largest magnitude", rows, seconds=".2f", ours_by_it=".2f", residual=".1e", differs=".1e")
    return rows


def eigen_rows(size: str, args: argparse.Namespace) -> list[dict]:
    case = Case(size, TRAINED)
    clean = fs.hessian(case.loss, case.theta)

    def ours() -> Pairs:
        found = fs.eigenpairs(
            fs.hessian(case.loss, case.theta), case.theta, key=fs.key(0), num=5, tol=RESIDUAL, vectors=True
        )
        return found.values, found.vectors, found.num_matvecs

    values, _, num = ours()
    small = size == "0.1M"
    runs = {("funcscope", f"tol {RESIDUAL}"): ours}
    if "curvlinops-for-pytorch" in args.peers:
        tol = 0.9 * RESIDUAL * float(values.abs().max() / values.abs().min())
        tried = {int(part * num) for part in ((0.5, 0.8, 0.9, 1.0, 1.1, 1.25) if small else (0.5, 0.9, 1.0))}
        ncv = peers.cheapest_ncv(case, clean, 5, tol, {max(12, part) for part in tried})
        runs["curvlinops", f"eigsh, ncv {ncv}, tol {tol:.1e}"] = lambda: peers.by_curvlinops(case, 5, ncv, tol)
    for again in (True, False)[: 1 + small] if "hessian-eigenthings" in args.peers else ():
        steps = peers.eigenthings_steps(clean, len(case.theta), 5, int(1.1 * num) + 3, 0.9 * RESIDUAL, again)
        setting = f"lanczos, max_iter {steps}, reorthogonalize={again}"
        runs["hessian-eigenthings", setting] = lambda n=steps, again=again: peers.by_eigenthings(case, 5, n, again)
    rows = []
    for (way, setting), run in runs.items():
        times, found = zip(*(seconds_of(run) for _ in range(3 if small else 1)), strict=True)
        rows.append({"way": way, "setting": setting, "seconds": statistics.median(times)})
        rows[-1] |= judged(*found[-1], clean, values)
        print(f"  {size} {way}: {rows[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    assert rows[0]["reached"], "ours did not get to the residual"
    if "PyHessian" in args.peers:
        rows.append(pyhessian_row(case, clean, values))
    return [{"size": size, **row, "ours_by_it": rows[0]["seconds"] / row["seconds"]} for row in rows]


def pyhessian_row(case: Case, clean: peers.Product, values: Tensor) -> dict:
    """With the loosest tolerance that gets there; of the larger model one run that is capped at 300 products."""
    row: dict = {}
    most, tols = (500, (1e-3, 1e-4, 1e-5, 1e-6)) if case.size == "0.1M" else (60, (1e-4,))
    for tol in tols:
        if row and row["reached"]:
            break
        taken, found = seconds_of(lambda tol=tol: peers.by_pyhessian(case, 5, most, tol))
        row = {"way": "PyHessian", "setting": f"tol {tol}, maxIter {most}", "seconds": taken}
        row |= judged(*found, clean, values)
    return row


def judged(values: Tensor, vectors: Tensor, num: int, clean: peers.Product, expected: Tensor) -> dict:
    """The true residuals, relative to the largest eigenvalue, and how far the values are from the expected ones."""
    order = values.abs().argsort(descending=True)
    values, vectors = values[order].double(), vectors[order]
    top = float(expected.abs().max())
    left = [float((clean(y) - theta.to(y) * y).norm()) / top for theta, y in zip(values, vectors, strict=True)]
    expected = expected.double()[expected.abs().argsort(descending=True)]
    differs = float(((values - expected) / expected).abs().max())
    reached = max(left) <= RESIDUAL and differs < 1e-3  # a value that was lost or came twice has good residuals
    shown = " ".join(f"{float(value):.4g}" for value in values)
    return {"products": num, "residual": max(left), "reached": reached, "differs": differs, "values": shown}


def density(args: argparse.Namespace) -> list[dict]:
    rows = [row for size in args.sizes if size != "llama-13M" for row in density_rows(size, args)]
    show("Spectral density, 40 steps per probe", rows, seconds=".2f", ours_by_it=".2f", trace=".4g", stderr=".2g")
    return rows


def density_rows(size: str, args: argparse.Namespace) -> list[dict]:
    case, probes = Case(size, TRAINED), args.probes or (8 if size == "0.1M" else 2)

    def ours() -> object:
        matvec = fs.hessian(case.loss, case.theta)
        return fs.spectral_density(matvec, case.theta, key=fs.key(0), num_probes=probes, steps=STEPS)

    warm(args)
    _ = case.loss, case.theta, case.plain  # trained and copied before anything is timed
    taken, found = seconds_of(ours)
    mean = {"trace": float(found.trace.value), "stderr": float(found.trace.stderr), "products": found.num_matvecs}
    rows = [{"way": "funcscope", "seconds": taken, **mean}]
    ends = (float(found.nodes.min()), float(found.nodes.max()))
    runs = {
        "curvlinops-for-pytorch": lambda: peers.density_by_curvlinops(case, probes, STEPS, ends),
        "hessian-eigenthings": lambda: peers.density_by_eigenthings(case, probes, STEPS),
        "PyHessian": lambda: peers.density_by_pyhessian(case, probes, STEPS),
    }
    for way in [way for way in runs if way in args.peers]:
        taken, trace = seconds_of(runs[way])
        rows.append({"way": way, "seconds": taken, "trace": trace, "products": probes * STEPS})
    return [{"size": size, "probes": probes, **row, "ours_by_it": rows[0]["seconds"] / row["seconds"]} for row in rows]


def trace(args: argparse.Namespace) -> list[dict]:
    """Root mean square error and mean reported standard error, as parts of the trace's size."""
    case = Case("1.5k", TRAINED)
    eye = torch.eye(len(case.theta))
    rows = []
    for kind, make in {"Hessian": fs.hessian, "GGN": fs.ggn}.items():
        dense = torch.func.vmap(make(case.loss, case.theta), chunk_size=64)(eye)
        for num in (8, 16, 32, 64):
            rows += [{"operator": kind, "products": num, **row} for row in trace_errors(dense, num, args)]
    show(f"Trace of {len(eye)} x {len(eye)}, relative errors", rows, rmse=".2%", stderr=".2%")
    return rows


def trace_errors(dense: Tensor, num: int, args: argparse.Namespace) -> list[dict]:
    like, exact = dense.new_zeros(len(dense)), float(dense.diag().double().sum())
    found = {}
    for method in (fs.hutchinson_trace, fs.xtrace):
        made = [method(lambda v: dense @ v, like, key=fs.key(seed), num=num) for seed in range(args.keys)]
        assert all(one.num_matvecs == num for one in made)
        found[method.__name__] = [float(one.value) for one in made], [float(one.stderr) for one in made]
    if "curvlinops-for-pytorch" in args.peers:
        import curvlinops

        torch.manual_seed(0)
        found["curvlinops.xtrace"] = [float(curvlinops.xtrace(dense, num)) for _ in range(args.keys)], []
    return [
        {
            "method": name,
            "rmse": statistics.fmean([(value / exact - 1) ** 2 for value in values]) ** 0.5,
            "stderr": statistics.fmean(errors) / abs(exact) if errors else None,
        }
        for name, (values, errors) in found.items()
    ]


def memory(args: argparse.Namespace) -> list[dict]:
    """Peaks in processes of their own; at the large vocabulary, times as well."""
    rows = []
    for size in [*({"14M"} & set(args.sizes)), "50k"]:
        case, large = Case(size), size == "50k"
        logits = 4 * case.ids.numel() * case.config.vocab_size / 2**20
        names = [BARE, *ways_of(case, args.peers, chunked=large)]
        peaks = {name: peak_in_a_process(size, *name) for name in names}
        timed = product_rows(size, args, 3, chunked=True) if large else []
        forwards = {(row["operator"], row["way"]): row["forwards"] for row in timed}
        rows += [
            {"size": size, "operator": name[0], "way": name[1], "peak_mib": peak, "over_bare_mib": peak - peaks[BARE]}
            | {"logits": peak / logits, "forwards": forwards.get(name)}
            for name, peak in peaks.items()
        ]
    title = "Peak memory of one product with its set-up, also in units of the logits"
    show(title, rows, peak_mib=".0f", over_bare_mib=".0f", logits=".2f", forwards=".2f")
    return rows


def peak_in_a_process(size: str, operator: str, way: str) -> float:
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--peak", size, operator, way]
    handed_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=handed_back)
    return float(done.stdout.split()[-1])


def peak_mib(size: str, operator: str, way: str) -> float:
    """In this process; a small model goes first, for all that torch loads when it is first used."""
    for name in ("1.5k", size):
        case = Case(name)
        v = torch.randn_like(case.theta)
        _ = case.loss, case.plain, case.bare()
        ways = ways_of(case, peers.installed(), chunked=True) | {BARE: lambda case=case: lambda _: case.bare()}
        peak = grown(lambda make=ways[operator, way], v=v: make()(v))
    return peak


def show(title: str, rows: list[dict], **formats: str) -> None:
    names = list(rows[0] | rows[-1])
    cells = [["" if row.get(x) is None else format(row[x], formats.get(x, "")) for x in names] for row in rows]
    print(f"\n{title}\n{tabulate(cells, headers=names, disable_numparse=True)}", flush=True)


SECTIONS = {"products": products, "eigen": eigen, "density": density, "trace": trace, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    sizes = ["0.1M", "14M", "llama-13M"]
    parser.add_argument("--sizes", nargs="+", default=sizes, choices=sizes)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="of the products")
    parser.add_argument("--probes", type=int, help="of the density (8 at 0.1M, 2 at 14M)")
    parser.add_argument("--keys", type=int, default=40, help="of the trace")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "curvature.json")
    parser.add_argument("--peak", nargs=3, metavar=("SIZE", "OPERATOR", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    if args.peak:
        print(peak_mib(*args.peak))
        return
    args.peers = peers.installed()
    for name in peers.PACKAGES.keys() - args.peers:
        print(f"{name} is left out: not installed; `sh bench/install_peers.sh VENV` installs it.")
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", *args.peers))
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
