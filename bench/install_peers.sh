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

# the solvers of torchjd's weightings, which bring no torch
"$python" -m pip install --quiet "torchjd[cagrad,quadprog-projector]==0.18.0"

# Of weights, influence and attributions, each with what it imports: powerlaw and captum matplotlib, kronfluence accelerate,
# fusion_bench lightning, hydra, peft and datasets. What does not install leaves its tests skipped, and the rest as it is.
optional() {
    "$python" -m pip install --quiet "$@" || echo "not installed, and its tests are skipped: $*"
}
optional "matplotlib>=3.9"
# later versions of devinterp's estimator of the learning coefficient take data sets and arrays of libraries of their own
optional --no-deps "devinterp==1.3.2" "cloudpickle>=3"
optional --no-deps "powerlaw==2.0.0" "weightwatcher==0.7.7"
optional --no-deps "captum==0.9.0"
optional --no-deps "kronfluence==1.0.1" "accelerate==1.15.0" "psutil>=6" "opt-einsum==3.4.0"
optional --no-deps "mergekit==0.1.5"
optional --no-deps "fusion_bench==0.2.33" "bidict==0.24.1" "hydra-core==1.3.8" "omegaconf==2.4.0" \
    "antlr4-python3-runtime==4.9.3" "lightning==2.6.6" "lightning_utilities==0.15.3" "torchmetrics==1.9.0" \
    "peft==0.21.2" "datasets==5.2.0" "multiprocess==0.70.19" "dill==0.4.1" "xxhash==4.1.0"

PYTHONPATH="$root/bench" "$python" - <<'CHECK'
from importlib.metadata import version
from importlib.util import find_spec

import transformers
from transformers import GPT2LMHeadModel  # noqa: F401

import curvlinops, hessian_eigenthings, loss_landscapes, pyhessian  # noqa: E401, F401
import landscape_peers

landscape_peers.landscaper()

if find_spec("torchvision"):
    raise SystemExit("torchvision is installed: transformers is broken by it here; `pip uninstall torchvision`.")
peers = ("curvlinops-for-pytorch", "hessian-eigenthings", "pyhessian", "landscaper", "loss-landscapes")
optional = ("devinterp", "powerlaw", "weightwatcher", "captum", "kronfluence", "mergekit", "fusion_bench")
found = (name for name in optional if find_spec(name))
print(", ".join(f"{name} {version(name)}" for name in (*peers, *found, "torch", "transformers")))
CHECK
