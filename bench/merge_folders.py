"""Peak memory and seconds of merges of folders, beside mergekit where it can be imported.

    python bench/merge_folders.py

Three random GPT-2 (124M) and a base are written to a temporary folder and deleted afterwards. Every merge is a process of
its own on one thread: seconds and peak resident memory are those of the whole process, imports among them
(VmHWM of Linux: `ru_maxrss` of a child begins with what its parent had). Linear merges are
compared entry by entry; TIES per tensor where mergekit's own semantics agree with ours: `normalize`, and but for entries
where the signs of the trimmed task vectors balance, and of equal magnitudes at the cut. DARE draws other masks, which have
nothing in common but their density. mergekit has no `scope` of the whole model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

METHODS = {"linear": {}, "ties": {"density": 0.2, "scope": "tensor"}, "dare": {"drop": 0.9}}
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
    own = {"linear": {}, "ties": {"density": 0.2}, "dare": {"density": 0.1}}[method]
    made: dict[str, object] = {
        "merge_method": THEIRS[method], "dtype": "float32",
        "models": [{"model": model, "parameters": {"weight": 1 / len(models), **own}} for model in models],
    }  # fmt: skip
    if method != "linear":
        made |= {"base_model": base, "parameters": {"normalize": method == "ties"}}
    return made


def difference(ours: Path, theirs: Path) -> tuple[float, float]:
    """The largest difference of two entries, and the share of entries that differ by more than rounding."""
    one = load_file(ours / "model.safetensors")
    files = sorted(theirs.glob("*.safetensors"))
    other = {name: x for file in files for name, x in load_file(file).items()}
    largest, num, total = 0.0, 0, 0
    for name, x in one.items():
        if name not in other:
            continue
        apart = (x.float() - other[name].float()).abs()
        largest = max(largest, float(apart.max()))
        num += int((apart > ROUNDING).sum())
        total += x.numel()
    return largest, num / total


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
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base, *models = folders(root, 3)
        print(f"{'merge':10}{'':12}{'seconds':>9}{'peak MiB':>10}{'largest difference':>20}{'share above 1e-6':>18}")
        for method, settings in METHODS.items():
            given = {"method": method, "out": str(root / method), **settings}
            if method != "linear":
                given["base"] = base
            seconds, peak = measured(OURS, [models, given])
            print(f"{method:10}{'funcscope':12}{seconds:9.1f}{peak:10.0f}", flush=True)
            if not peer:
                continue
            out = root / f"{method} of mergekit"
            try:
                seconds, peak = measured(MERGEKIT, [configuration(method, models, base), str(out)])
            except RuntimeError as error:
                print(f"{method:10}{'mergekit':12}{error}")
                continue
            apart, share = difference(root / method, out)
            print(f"{method:10}{'mergekit':12}{seconds:9.1f}{peak:10.0f}{apart:20.2g}{share:18.2g}", flush=True)


if __name__ == "__main__":
    main()
