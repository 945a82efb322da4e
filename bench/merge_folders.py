"""Peak memory and seconds of merges of folders, beside mergekit where it can be imported.

    python bench/merge_folders.py

Three random GPT-2 (124M) and a base are written to a temporary folder and deleted afterwards. Every merge is a process of
its own on one thread: seconds and peak resident memory are those of the whole process, imports among them
(VmHWM of Linux: `ru_maxrss` of a child begins with what its parent had).

Linear merges and TIES per tensor are compared entry by entry. Of TIES, mergekit keeps the integer part of the density times
the number of entries, we the nearest integer: a density of a quarter, which divides every tensor of GPT-2, makes both one
number. It keeps any of the entries whose magnitudes equal the last, we the first of them; and it elects + where the signs
balance, we none, which rounding decides where they nearly do. `beside the cut` is the share of entries that differ and are
none of these. DARE draws other masks, which have nothing in common but their density, and with `rescale: true` mergekit
keeps the length of a task vector instead of its mean: seconds and memory alone are beside each other. mergekit has no
`scope` of the whole model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

DENSITY = 0.25
METHODS = {
    "linear": ("linear", {}), "ties": ("ties", {"density": DENSITY, "scope": "tensor"}),
    "ties, model": ("ties", {"density": DENSITY, "scope": "model"}), "dare": ("dare", {"drop": 0.9}),
}  # fmt: skip
"""By what they are called in the table; of one name with mergekit's, but for the scope that it has not."""
THEIRS = {"linear": "linear", "ties": "ties", "dare": "dare_linear"}
ROUNDING = 1e-6

OURS = r"""
import json, re, sys, time
started = time.perf_counter()
import torch
torch.set_num_threads(1)
from funcscope.study.merging import merge_folders
models, given = json.loads(sys.argv[1])
merge_folders(models, **given)
print(time.perf_counter() - started, int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024)
"""
MERGEKIT = r"""
import json, re, sys, time
started = time.perf_counter()
import torch
torch.set_num_threads(1)
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
config, out = json.loads(sys.argv[1])
run_merge(MergeConfiguration.model_validate(config), out, MergeOptions(copy_tokenizer=False, quiet=True, lazy_unpickle=True))
print(time.perf_counter() - started, int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def measured(program: str, given: object) -> tuple[float, float]:
    """Seconds, and MiB at the peak, of a process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, json.dumps(given)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    seconds, peak = map(float, done.stdout.split()[-2:])
    return seconds, peak


def configuration(method: str, models: list[str], base: str) -> dict[str, object]:
    """What mergekit is to do."""
    own = {"linear": {}, "ties": {"density": DENSITY}, "dare": {"density": 0.1}}[method]
    made: dict[str, object] = {
        "merge_method": THEIRS[method], "dtype": "float32",
        "models": [{"model": model, "parameters": {"weight": 1 / len(models), **own}} for model in models],
    }  # fmt: skip
    if method != "linear":
        made |= {"base_model": base, "parameters": {"normalize": method == "ties"}}
    return made


def difference(ours: Path, theirs: Path, near: Callable[[str], torch.Tensor] | None) -> tuple[float, float, float]:
    """The largest difference, the share of entries that differ by more than rounding, and of those that are not near."""
    one = load_file(ours / "model.safetensors")
    other = {name: x for file in sorted(theirs.glob("*.safetensors")) for name, x in load_file(file).items()}
    if lacking := one.keys() - other.keys():
        raise RuntimeError(f"mergekit has written none of {sorted(lacking)[:3]}.")
    largest, num, rest, total = 0.0, 0, 0, 0
    for name, x in one.items():
        apart = (x.float() - other[name].float()).abs()
        differ = apart > ROUNDING
        largest = max(largest, float(apart.max()))
        num += int(differ.sum())
        rest += int((differ & ~near(name)).sum() if near is not None and bool(differ.any()) else differ.sum())
        total += x.numel()
    return largest, num / total, rest / total


def undecided(models: list[str], base: str) -> Callable[[str], torch.Tensor]:
    """Entries of a tensor whose magnitude is that of the cut in a model, or whose trimmed signs balance but for rounding."""
    zero, *each = (load_file(Path(model) / "model.safetensors") for model in (base, *models))

    def entries(name: str) -> torch.Tensor:
        taus = torch.stack([(x[name] - zero[name]).double() for x in each]).flatten(1)
        num = taus.shape[1]
        cuts = taus.abs().kthvalue(num - int(DENSITY * num) + 1, 1, keepdim=True).values
        kept = torch.where(taus.abs() >= cuts, taus, 0.0)
        even = kept.sum(0).abs() <= 1e-6 * kept.abs().sum(0)
        return ((taus.abs() == cuts).any(0) | (even & (kept != 0).any(0))).view(zero[name].shape)

    return entries


def folders(root: Path, num: int) -> list[str]:
    """A base, and models whose task vectors are normal."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config())
        base = [x.detach().clone() for x in model.parameters()]
        for k in range(num + 1):
            with torch.no_grad():
                for x, zero in zip(model.parameters(), base, strict=True):
                    x.copy_(zero + 1e-2 * torch.randn_like(zero) if k else zero)
            model.save_pretrained(root / str(k))
    return [str(root / str(k)) for k in range(num + 1)]


def main() -> None:
    peer = importlib.util.find_spec("mergekit") is not None
    if not peer:
        print(
            "mergekit cannot be imported: funcscope alone is measured. `pip install mergekit`, or put it on PYTHONPATH."
        )
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base, *models = folders(root, 3)
        print(
            f"{'merge':14}{'':12}{'seconds':>9}{'peak MiB':>10}{'largest difference':>20}{'share above 1e-6':>18}"
            f"{'beside the cut':>16}"
        )
        for label, (method, settings) in METHODS.items():
            given = {"method": method, "out": str(root / label), **settings}
            if method != "linear":
                given["base"] = base
            seconds, peak = measured(OURS, [models, given])
            print(f"{label:14}{'funcscope':12}{seconds:9.1f}{peak:10.0f}", flush=True)
            if not peer or settings.get("scope") == "model":
                continue
            out = root / f"{label} of mergekit"
            try:
                seconds, peak = measured(MERGEKIT, [configuration(method, models, base), str(out)])
            except RuntimeError as error:
                print(f"{label:14}{'mergekit':12}{error}")
                continue
            print(f"{label:14}{'mergekit':12}{seconds:9.1f}{peak:10.0f}", end="", flush=True)
            if method != "dare":
                near = undecided(models, base) if method == "ties" else None
                largest, share, rest = difference(root / label, out, near)
                print(f"{largest:20.2g}{share:18.2g}{rest:16.2g}", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
