"""The command `check`: which derivatives of the user's own model are right."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..core.keys import fold_in, key
from ..curvature.audit import audit
from ..study.listing import terminal_width
from ..study.opening import Source, check_source, open_model
from .own_model import _add_computing, _add_texts, _given
from .shared import print_data

LENGTH = 32


def add_check(commands: Any) -> None:
    d = Source("", num_samples=8)
    show = commands.add_parser(
        "check",
        help="which derivatives of your own model are right, and which module breaks those that are not",
        description="Reads a local Hugging Face folder and a file of texts, takes slopes and curvatures along random "
        "directions from values of the loss alone, in float64, and compares them with every way of differentiation that the "
        "other commands use. Exits with 1 where one is wrong. A few texts are enough.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    show.add_argument("model", type=Path, metavar="MODEL", help="a local folder as `save_pretrained` writes it")
    show.add_argument("--data", required=True, metavar="FILE", help="texts: .txt, .jsonl or .parquet")
    show.add_argument("--directions", type=int, default=3, metavar="N", help="random directions, at least 2")
    show.add_argument("--seed", type=int, default=d.seed, metavar="S", help="of the directions and masked tokens")
    _add_texts(show, d, length=LENGTH)
    _add_computing(show, d)
    show.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    source = Source(**_given(args, Source))
    check_source(source)
    loss, data, _ = open_model(source, args.model, length=LENGTH)
    result = audit(loss, loss.net.params, key=fold_in(key(source.seed), "audit"), num=args.directions)
    print_data(source, data, terminal_width())
    print(f"\n{result}")
    return 0 if result.right else 1
