"""Commands for the user's own model: `directional` and `curvature`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, get_args

from ..core.store import load
from ..study import curvature, directional
from ..study.curvature_stages import STAGES
from ..study.curvature_stages import Settings as CurvatureSettings
from ..study.curvature_table import text as curvature_text
from ..study.directional_rows import text as directional_text
from ..study.inputs import DType, Task, Unit
from ..study.listing import terminal_width
from ..study.opening import DataSpec
from ..study.unfinished import kept
from .shared import check_plotly, check_writable, print_data, print_files

FIELDS = directional.Settings.__dataclass_fields__ | CurvatureSettings.__dataclass_fields__
"""Settings that are arguments of Python and options here."""


def add_directional(commands: Any) -> None:
    d = directional.Settings("")
    show = commands.add_parser(
        "directional",
        help="losses, slopes and curvatures of your own model along random directions",
        description="Reads a local Hugging Face folder and a file of texts, samples the loss along random directions on "
        "both sides, prints a table, and writes a page and the numbers. An interrupted call goes on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    show.add_argument("model", type=Path, metavar="MODEL", help="a local folder as `save_pretrained` writes it")
    show.add_argument("--data", required=True, metavar="FILE", help="texts: .txt, .jsonl or .parquet")
    show.add_argument(
        "--compare",
        type=Path,
        metavar="MODEL2",
        help="a second model of the same shape, on the same directions and texts",
    )
    show.add_argument("--out", type=Path, default=Path("funcscope-directional"), metavar="DIR", help="where to write")
    show.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_texts(show, d, length=128)
    sampling = show.add_argument_group("sampling")
    sampling.add_argument(
        "--samples", dest="n_samples", type=int, default=d.n_samples, metavar="N", help="random directions"
    )
    sampling.add_argument("--span", type=float, default=d.span, metavar="H", help="step along each direction")
    sampling.add_argument("--normalize", choices=["filter", "layer", "global"], default=d.normalize, help="scale of d")
    sampling.add_argument("--distribution", choices=["normal", "rademacher"], default=d.distribution, help="draws")
    sampling.add_argument(
        "--curvature", choices=get_args(directional.Curvature), default=d.curvature, help="of the loss"
    )
    sampling.add_argument("--no-slopes", dest="slopes", action="store_false", help="leave the gradient out")
    sampling.add_argument("--seed", type=int, default=d.seed, metavar="S", help="of the directions and masked tokens")
    _add_computing(show, d)
    show.set_defaults(run=_directional)


def add_curvature(commands: Any) -> None:
    d = CurvatureSettings("")
    show = commands.add_parser(
        "curvature",
        help="spectrum of the Hessian, trace, curvature of every block and sharpness of your own model",
        description="Reads a local Hugging Face folder and a file of texts, finds both ends of the spectrum of the Hessian "
        "(or the Gauss-Newton matrix), its density, its trace and those of its blocks, measures sharpness, prints tables, "
        "and writes a page and the numbers. An interrupted call goes on where it was. Every product with the matrix costs 4 "
        "to 6 forward passes over all texts, and there are some 550: fewer texts, --probes or --steps make it shorter.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    show.add_argument("model", type=Path, metavar="MODEL", help="a local folder as `save_pretrained` writes it")
    show.add_argument("--data", required=True, metavar="FILE", help="texts: .txt, .jsonl or .parquet")
    show.add_argument("--out", type=Path, default=Path("funcscope-curvature"), metavar="DIR", help="where to write")
    show.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_texts(show, d, length=curvature.LENGTH)
    spectrum = show.add_argument_group("spectrum")
    spectrum.add_argument(
        "--matrix", choices=["hessian", "ggn"], default=d.matrix, help="second derivatives of the loss"
    )
    spectrum.add_argument("--num", type=int, default=d.num, metavar="K", help="eigenvalues from each end")
    spectrum.add_argument("--tol", type=float, default=d.tol, help="residual, relative to the largest |eigenvalue|")
    spectrum.add_argument("--probes", type=int, default=d.probes, metavar="N", help="random starts of the density")
    spectrum.add_argument("--steps", type=int, default=d.steps, metavar="M", help="products per start")
    spectrum.add_argument(
        "--trace-products", type=int, default=d.trace_products, metavar="N", help="products for the trace"
    )
    spectrum.add_argument(
        "--blocks",
        action=argparse.BooleanOptionalAction,
        default=d.blocks,
        help="trace and top eigenvalue of every block",
    )
    spectrum.add_argument("--by", choices=["layer", "module", "tensor"], default=d.by, help="what a block is")
    spectrum.add_argument(
        "--block-products", type=int, default=d.block_products, metavar="N", help="products for the traces of blocks"
    )
    spectrum.add_argument("--epsilon", type=float, default=d.epsilon, help="radius of SAM's ball, a distance")
    spectrum.add_argument("--seed", type=int, default=d.seed, metavar="S", help="of the probes and masked tokens")
    computing = _add_computing(show, d)
    computing.add_argument("--no-keep", dest="keep", action="store_false", help="no graph is kept: slower, less memory")
    computing.add_argument("--memory", type=float, default=d.memory, metavar="GIB", help="for vectors kept at a time")
    show.set_defaults(run=_curvature)


def _add_texts(show: argparse.ArgumentParser, d: DataSpec, length: int) -> None:
    texts = show.add_argument_group("texts")
    texts.add_argument(
        "--task", choices=get_args(Task), help="what the model is trained for, if config.json does not say"
    )
    texts.add_argument("--field", default=d.field, metavar="NAME", help="field or column that holds the text")
    texts.add_argument("--label-field", metavar="NAME", help="field or column that holds the class")
    texts.add_argument("--unit", choices=get_args(Unit), default=d.unit, help="what one text of a .txt file is")
    texts.add_argument("--num-samples", type=int, default=d.num_samples, metavar="N", help="texts that are scored")
    texts.add_argument(
        "--max-seq-length",
        type=int,
        metavar="T",
        help=f"tokens kept of each: {length}, or as many positions as there are",
    )
    texts.add_argument("--batch-size", type=int, default=d.batch_size, metavar="B", help="texts per forward pass")
    texts.add_argument("--packing", action="store_true", help="cut the joined texts into full blocks, without padding")


def _add_computing(show: argparse.ArgumentParser, d: DataSpec) -> Any:
    computing = show.add_argument_group("computing")
    computing.add_argument("--dtype", choices=get_args(DType), default=d.dtype, help="of the weights; auto: as stored")
    computing.add_argument(
        "--compute-dtype", choices=get_args(DType), default=d.compute_dtype, help="weights are cast where they are used"
    )
    computing.add_argument("--attention", choices=["eager", "math", "keep"], default=d.attention, help="the kernel")
    computing.add_argument("--device", default=d.device, metavar="NAME", help="cpu, cuda, cuda:1, mps")
    computing.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin, as tensors only")
    return computing


def _directional(args: argparse.Namespace) -> int:
    check_plotly()
    settings = directional.Settings(**_given(args, directional.Settings))
    check_writable(args.out)
    started = time.perf_counter()
    try:
        study = directional.run(settings, args.model, args.out, other=args.compare, quiet=args.quiet)
        from ..view.directional import write_page

        page = write_page(study.numbers)
    except KeyboardInterrupt:
        left = f"samples are kept in {args.out}, the same command goes on from there" if kept(args.out) else ""
        print(f"\nfuncscope: interrupted; {left or 'nothing was sampled yet'}.")
        return 130
    width = terminal_width()
    print_data(settings, study.data, width)
    print(f"\n{directional_text(load(study.numbers).meta, width=width)}")
    print(f"\n{time.perf_counter() - started:.0f} s")
    print_files(page, study.numbers)
    return 0


def _curvature(args: argparse.Namespace) -> int:
    check_plotly()
    settings = CurvatureSettings(**_given(args, CurvatureSettings))
    check_writable(args.out)
    try:
        study = curvature.run(settings, args.model, args.out, quiet=args.quiet)
        from ..view.curvature import write_page

        page = write_page(study.numbers)
    except KeyboardInterrupt:
        ended = {path.name.split(".")[-3] for path in kept(args.out)}
        stages = [stage.replace("_", " ") for stage in STAGES if stage in ended]
        left = f"finished and kept in {args.out}: {', '.join(stages)}; the same command goes on from there"
        print(f"\nfuncscope: interrupted; {left if stages else 'no stage was finished yet'}.")
        return 130
    width = terminal_width()
    print_data(settings, study.data, width)
    print(f"\n{curvature_text(study.summary, load(study.numbers), width=width)}")
    print_files(page, study.numbers)
    return 0


def _given(args: argparse.Namespace, settings: type[DataSpec]) -> dict[str, Any]:
    """What was said on the command line, for these settings."""
    return {name: value for name, value in vars(args).items() if name in settings.__dataclass_fields__}
