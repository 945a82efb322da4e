"""The command `check`: which derivatives of the user's own model are right."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..core.checks import check_count
from ..core.keys import fold_in
from ..curvature.audit import Audit, audit
from ..study.config import UnifiedConfig
from ..study.listing import Listing, terminal_width, wrapped
from ..study.texts import Usual, check_data
from .options import COMPUTING, STREAM, TEXTS, add_fields, changed

FEW = {"num_samples": 8, "max_seq_length": Usual(32), "batch_size": 8}
ALONE = "a sequence alone"
"""The way that compares sequences alone with the same in a batch."""


def add_check(commands: Any) -> None:
    show = commands.add_parser(
        "check",
        help="which derivatives of your own model are right, and which module breaks those that are not",
        description="Reads a local Hugging Face folder and a file of texts, takes slopes and curvatures along random "
        "directions from values of the loss alone, in float64, and compares them with every way of differentiation that the "
        "other commands use. Exits with 1 where one is wrong. A few texts are enough.",
    )
    show.add_argument("model", type=Path, metavar="MODEL", help="a local folder as `save_pretrained` writes it")
    show.add_argument("--data", dest="dataset_name", required=True, metavar="FILE", help="texts")
    show.add_argument(
        "--directions", type=int, default=3, metavar="N", help="random directions, at least 2 (default: 3)"
    )
    add_fields(show.add_argument_group("texts"), TEXTS, FEW)
    add_fields(show.add_argument_group("computing"), COMPUTING | STREAM, FEW)
    show.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    config = UnifiedConfig.load(**{**FEW, **changed(args, {})[0]})
    spec = config.tasks()["data"]
    check_data(spec)
    check_count("directions", args.directions, least=2)
    from ..study.inputs.opened import OpenedModel  # and with it transformers, which takes longer to import than torch

    loss, data = OpenedModel.of(spec, args.model).loss(spec, length=config.max_seq_length)
    root = fold_in(config.options().key, "audit")
    result = audit(loss, loss.net.params, key=root, num=args.directions)
    width = terminal_width()
    print(wrapped(str(data), width))
    title, *_ = str(result).split("\n")
    print(f"\n{wrapped(title, width)}\n{_listing(result, data.num_samples).text(width)}")
    return 0 if result.right else 1


def _listing(result: Audit, num: int) -> Listing:
    """Ways and verdicts, then the modules that break them; a single sequence cannot be compared with itself in a batch."""
    rows: list[tuple[str, ...]] = []
    for way in result.ways:
        if num == 1 and way.name == ALONE:
            rows.append((way.name, str(way.order), "undecided", "", "", "there is one sequence"))
            continue
        numbers = ("" if math.isnan(x) else f"{x:.1e}" for x in (way.deviation, way.allowed))
        rows.append((way.name, str(way.order), way.verdict, *numbers, way.reason))
    headers = ("", "order", "verdict", "deviation", "allowed", "note")
    return Listing(headers, tuple(rows), tuple(result.notes)).trimmed()
