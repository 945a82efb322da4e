"""The page of a model of one's own, and of two: numbers as stored, every finite sample drawn, text escaped."""

import html
import math
import re
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from problems import loss_of
from scipy import stats

import funcscope as fs
from funcscope.core.store import load, save
from funcscope.landscape.compare import compare_directional
from funcscope.landscape.precision import Realised
from funcscope.landscape.samples import DirectionalLosses, Plan
from funcscope.view import comparison_sections, directional, directional_sections, page, samples, show, theme
from funcscope.view.pairing import Comparison
from funcscope.view.result import is_resolved, mark, read, short

NAN = math.nan
HOSTILE = "<script>alert(1)</script>"
REALISED = Realised(displacement=3.4, error=0.31, asymmetry=0.22, unmoved=0.41, loss_error=2e-3)


def made(num=12, seed=0, *, level=2.0, rise=0.1, scale=1.0, two_sided=True, slopes=True, bent=True, **changes):
    """A result with made-up samples: a quadratic loss with some noise, its statistics computed by the class itself."""
    rng, h = np.random.default_rng(seed), changes.get("actual_span", 0.1)
    slope, curved = scale * rng.normal(0, 0.3, num), scale * rng.normal(rise, 0.3 * abs(rise), num) * 2 / h**2
    cubic = scale * 0.01 * rng.normal(size=num)
    pos, neg = (torch.tensor(level + s * h * slope + h**2 / 2 * curved + s * cubic) for s in (1, -1))
    fields = {
        "baseline_loss": level, "losses": pos, "losses_negative": neg if two_sided else None,
        "slopes": torch.tensor(slope) if slopes else None, "exact_curvatures": None,
        "direction_norms": torch.full((num,), 30.0, dtype=torch.float64), "param_norm": 30.0, "span": h, "actual_span": h,
        "normalize": "filter", "distribution": "normal", "relative_span": False, "global_renorm": False,
        "compute_curvature": bent, "unit_roundoff": 2.0**-24, "homogeneous_dtype": True, "realised": None,
        "key": fs.key(42), "plan": Plan(False, 8, 1), "num_forwards": 2 + 2 * num, "num_gradients": 1, "num_jvps": 0,
        "num_second_jvps": 0,
    }  # fmt: skip
    return DirectionalLosses(**(fields | changes))


def stored(folder, *results, names=("base", "longer"), stem="run", task="causal"):
    """The results in the form of `study.directional.run`."""
    prefixes = ("",) if len(results) == 1 else ("first_", "second_")
    models, arrays = [], {}
    for result, name, prefix in zip(results, names, prefixes, strict=False):
        values = result.asdict()
        found = {key: x for key, x in values.items() if isinstance(x, np.ndarray)}
        arrays |= {f"{prefix}{key}": x for key, x in found.items()}
        half = "torch.bfloat16" if result.realised else "torch.float32"
        models.append({
            "name": name, "class": "Qwen2ForCausalLM", "num_parameters": 1234567, "dtype": half, "compute_dtype": half,
            "attention": "eager", "values": {key: x for key, x in values.items() if key not in found},
        })  # fmt: skip
    data = {"path": "<b>texts</b>.txt", "task": task, "num_samples": 32, "num_tokens": 3053, "num_scored": 3021}
    data |= {"num_too_short": 3, "num_truncated": 15, "num_batches": 4}
    settings = {"data": "<b>texts</b>.txt", "span": 0.1, "max_seq_length": 128, "packing": False, "task": None}
    meta = {
        "kind": "directional" if len(results) == 1 else "comparison", "settings": settings, "models": models,
        "data": data, "seconds": 12.3, "versions": {"torch": "2.13"},
    }  # fmt: skip
    if len(results) == 2:
        meta["comparison"] = compare_directional(*results, names=names).asdict()
    path = folder / f"{stem}.npz"
    save(path, arrays, meta)
    return path
