"""Derivatives of deep models whose graphs are kept whole, or whose layers are rematerialised: time and memory a layer.

    python bench/deep.py [--layers N ...] [--ways NAME ...] [--tokens N] [--threads N]

A Llama of 384 units, one sequence; each row is a process of its own, measured as in bench/long.py. `a layer` is the memory
that each layer adds to a product, in MiB, from the model of the fewest to that of the most layers: what is kept of it, and
some four vectors of the length of its parameters, 6 MiB each.
"""

from __future__ import annotations

import argparse
from typing import Any

from long import WAYS, child, report
from tabulate import tabulate


def rows_of(way: str, remat: str, layers: list[int], tokens: int, threads: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for num in layers:
        figures = child("llama", tokens, way, "auto", remat, num, threads=threads)
        if figures is not None:
            rows.append({"way": way, "remat": remat, "layers": num, **figures})
            print(tabulate(rows[-1:], headers="keys", floatfmt=".3g"), flush=True)
    if len(rows) > 1:
        added = (rows[-1]["memory"] - rows[0]["memory"]) / (rows[-1]["layers"] - rows[0]["layers"])
        rows = [{**row, "a layer": added} for row in rows]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--ways", nargs="+", default=["ggn", "hessian"], choices=WAYS)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    each = [
        rows_of(way, remat, args.layers, args.tokens, args.threads) for way in args.ways for remat in ("none", "layer")
    ]
    report([row for rows in each for row in rows], "deep")


if __name__ == "__main__":
    main()
