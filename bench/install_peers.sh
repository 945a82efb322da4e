#!/bin/sh
# The libraries that bench/curvature.py, bench/landscape.py and the outsider tests compare with, into the virtual environment
# of funcscope.
#
#     sh bench/install_peers.sh VENV
#
# VENV is made where it does not exist, with funcscope of this checkout. The peers come without their dependencies, as
# those bring torchvision, which breaks transformers here; what they import besides torch, numpy and scipy is named below.
set -eu

venv=${1:?"usage: sh bench/install_peers.sh VENV"}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
python="$venv/bin/python"
"$python" -c "import funcscope, torch, transformers" 2>/dev/null || "$python" -m pip install --quiet torch==2.13.0 -e "$root"

"$python" -m pip install --quiet --no-deps --pre \
    "curvlinops-for-pytorch==3.0.1" "hessian-eigenthings==1.0.0a5" "pyhessian==0.1"
# curvlinops imports these three; linear_operator imports jaxtyping, mpmath and scipy, which torch and funcscope bring
"$python" -m pip install --quiet --no-deps "einops>=0.8" "einconv==0.1.0" "linear_operator==0.6.1"
# landscaper's planes (its modules compute and utils) import numpy, torch and tqdm only, and are imported alone, by
# bench/landscape_peers.py: gudhi, topopy, nglpy, scikit-learn, matplotlib, ..., which its package imports, are left out
"$python" -m pip install --quiet --no-deps "landscaper==1.3.1" "loss-landscapes==3.0.6"
# devinterp's estimator of the learning coefficient; later versions of it take data sets and arrays of libraries of their own.
# It imports cloudpickle and matplotlib, which imports the others; einops is above
"$python" -m pip install --quiet --no-deps "devinterp==1.3.2" \
    "cloudpickle>=3" "matplotlib>=3.9" "contourpy>=1.3" "cycler>=0.12" "kiwisolver>=1.4" "pyparsing>=3.1" "pillow>=11"

# the solvers of torchjd's weightings, which bring no torch
"$python" -m pip install --quiet "torchjd[cagrad,quadprog_projector]==0.18.0"

PYTHONPATH="$root/bench" "$python" - <<'CHECK'
from importlib.metadata import version
from importlib.util import find_spec

import transformers
from transformers import GPT2LMHeadModel  # noqa: F401

import curvlinops, devinterp.slt.sampler, hessian_eigenthings, loss_landscapes, pyhessian  # noqa: E401, F401
import landscape_peers

landscape_peers.landscaper()

if find_spec("torchvision"):
    raise SystemExit("torchvision is installed: transformers is broken by it here; `pip uninstall torchvision`.")
peers = ("curvlinops-for-pytorch", "hessian-eigenthings", "pyhessian", "landscaper", "loss-landscapes", "devinterp")
print(", ".join(f"{name} {version(name)}" for name in (*peers, "torch", "transformers")))
CHECK
