"""The commands `merge` and `fisher`: one folder from several, and what a merge needs to know of each model's data."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from inspect import signature
from typing import Any, get_args

from tqdm.auto import tqdm

from ..study.config import UnifiedConfig
from ..study.merge_checks import METHODS
from ..study.merge_data import measure_for_merge
from ..study.merging import merge_folders
from ..study.texts import DataSpec, DType, Usual, check_data
from .options import COMPUTING, TEXTS, add_fields, changed

FEW = {"num_samples": 64, "max_seq_length": Usual(128), "batch_size": 1, "attention": "eager"}
"""One text at a time has the least noise and takes the least memory."""
_OWN = {
    "scale": (float, "of the merged task vector"),
    "density": (float, "share of a task vector that ties keeps"),
    "drop": (float, "share of a task vector that dare drops"),
    "shrink": (float, "of off-diagonals in regmean"),
    "shard_bytes": (int, "of one file of weights"),
}


def add_merge(commands: Any) -> None:
    show = commands.add_parser(
        "merge",
        help="one model folder from several, a part of a tensor at a time",
        description="Merges Hugging Face folders of one architecture, of any size and number, into a folder that "
        "`from_pretrained` loads, with a README that says how it was made. Nothing is overwritten.",
    )
    show.add_argument("models", nargs="+", metavar="MODEL", help="local folders as `save_pretrained` writes them")
    show.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    show.add_argument("--method", choices=METHODS, default="linear", help="the rule (default: linear)")
    show.add_argument("--base", metavar="BASE", help="what all were fine-tuned from: task_arithmetic, ties, dare")
    show.add_argument("--weights", type=float, nargs="+", metavar="W", help="one per model (default: equal)")
    for name, (kind, text) in _OWN.items():
        default = _default(name)
        flag = f"--{name.replace('_', '-')}"
        show.add_argument(flag, type=kind, default=default, metavar="X", help=f"{text} (default: {default:g})")
    show.add_argument(
        "--scope", choices=("model", "tensor"), default="model",
        help="ties ranks entries over the whole model, as its paper, or in each tensor, as mergekit (default: model)",
    )  # fmt: skip
    show.add_argument("--fisher", nargs="+", default=[], metavar="FILE", help="of `funcscope fisher`, one per model")
    show.add_argument(
        "--grams", nargs="+", default=[], metavar="FILE", help="of `funcscope fisher --what inputs`, one per model"
    )
    show.add_argument(
        "--data", nargs="+", default=[], metavar="FILE", help="instead of these: texts, one file per model"
    )
    show.add_argument("--merged-dtype", choices=get_args(DType), default="auto", help="auto: the widest of the models")
    show.add_argument("--quiet", action="store_true", help="no progress bar")
    add_fields(show.add_argument_group("texts, with --data"), TEXTS, FEW)
    add_fields(show.add_argument_group("computing, with --data"), COMPUTING, FEW)
    show.set_defaults(run=_merge)


def add_fisher(commands: Any) -> None:
    show = commands.add_parser(
        "fisher",
        help="the Fisher diagonal of a model on its texts, or the Grams of its inputs, as a file for `merge`",
        description="Writes one safetensors file with an entry per weight, made once and shared. Sums are kept in the file: "
        "memory is that of the model, one batch and the largest gradient.",
    )
    show.add_argument("model", metavar="MODEL", help="a local folder as `save_pretrained` writes it")
    show.add_argument("--data", required=True, metavar="FILE", help="the texts that the model was trained for")
    show.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    show.add_argument(
        "--what", choices=("fisher", "inputs"), default="fisher",
        help="the Fisher diagonal, or for regmean the Grams of every linear layer's inputs (default: fisher)",
    )  # fmt: skip
    show.add_argument("--draws", type=int, default=1, metavar="N", help="of all labels from the model (default: 1)")
    add_fields(show.add_argument_group("texts"), TEXTS, FEW)
    add_fields(show.add_argument_group("computing"), COMPUTING, FEW)
    show.set_defaults(run=_fisher)


def _merge(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    given: dict[str, Any] = {name: getattr(args, name) for name in ("method", "base", "weights", "scope", *_OWN)}
    given |= {"seed": _config(args).seed, "dtype": args.merged_dtype}
    given |= {"fishers": args.fisher, "grams": args.grams, "data": [_spec(args, file) for file in args.data]}
    with tqdm(unit="B", unit_scale=True, disable=args.quiet, dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        merged = merge_folders(args.models, out=args.out, progress=show, **given)
    print(
        f"{merged.num_parameters:,} parameters of {len(args.models)} models in {merged.num_tensors} tensors, "
        f"{time.perf_counter() - started:.0f} s\nmerged   {merged.path}"
    )
    return 0


def _fisher(args: argparse.Namespace) -> int:
    made = measure_for_merge(args.model, _spec(args, args.data), args.out, what=args.what, num=args.draws)
    print(f"{made['what']} of {made['model']} on {made['texts']} texts of {made['data']}\nfile     {args.out}")
    return 0


def _config(args: argparse.Namespace) -> UnifiedConfig:
    return UnifiedConfig.load(**{**FEW, **changed(args, {})[0]})


def _spec(args: argparse.Namespace, file: str) -> DataSpec:
    spec = replace(_config(args).tasks()["data"], data=file)
    check_data(spec)
    return spec


def _default(name: str) -> Any:
    return signature(merge_folders).parameters[name].default
