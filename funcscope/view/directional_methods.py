"""How stored directional losses were made: model, texts, directions, formulas, errors and costs."""

from __future__ import annotations

from typing import Any

from ..core.store import Stored
from ..study.opening import one_sequence
from .numbers import counted, number, setting
from .page import Terms
from .result import Result

_SCALED = {
    "filter": "scaled so that every filter of d has the norm of the same filter of θ",
    "layer": "scaled so that every layer of d has the norm of the same layer of θ",
    "global": "scaled to norm 1",
}
_SCORED = {
    "causal": ("tokens", "predicted from those before them"),
    "masked": ("masked tokens", "predicted from the others"),
    "classification": ("texts", "predicted as one of the classes"),
}


def terms(stored: Stored, results: tuple[Result, ...]) -> Terms:
    """The block that a reader needs to make the numbers again."""
    meta = stored.meta
    settings = ", ".join(f"{name} {_plain(value)}" for name, value in meta["settings"].items() if value is not None)
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return Terms(
        [
            ("Model" if len(results) == 1 else "Models", [_model(result) for result in results]),
            ("Texts", _texts(meta)),
            ("Directions", _directions(results)),
            ("Formulas", _formulas(results)),
            ("Errors", _errors(results)),
            ("Cost", [*(_cost(result, len(results)) for result in results), _time(meta)]),
            ("Settings", [settings]),
            ("Versions", [versions]),
        ]
    )


def scored(task: str) -> tuple[str, str]:
    """What the loss is a mean over, and how it is scored."""
    return _SCORED.get(task, ("positions", "as the task has it"))


def alone(meta: dict[str, Any]) -> list[str]:
    """What a single sequence leaves unknown."""
    note = one_sequence(meta["settings"], meta["data"]["num_samples"])
    return [note] if note else []


def _model(result: Result) -> str:
    model = result.model
    stored, computed = (model[name].removeprefix("torch.") for name in ("dtype", "compute_dtype"))
    folder = f", from {model['folder']}" if "folder" in model else ""
    return (
        f"{result.name}: {model['class']}, {model['num_parameters']:,} parameters of norm "
        f"{number(result.values['param_norm'], 4)} in {stored}, computed in {computed}, attention {model['attention']}, "
        f"eval mode{folder}."
    )


def _texts(meta: dict[str, Any]) -> list[str]:
    data, settings = meta["data"], meta["settings"]
    what, how = scored(data["task"])
    pieces = "joined block" if settings.get("packing") else "text"
    length = settings.get("max_seq_length") or meta["models"][0].get("max_seq_length")
    batches = f"{data['num_batches']:,} {'batch' if data['num_batches'] == 1 else 'batches'}"
    return [
        f"{data['path']}: {counted(data['num_samples'], pieces)} in {batches}, {data['num_tokens']:,} tokens. Scored are "
        f"{data['num_scored']:,} {what}, {how}; the loss is their mean cross-entropy in nats, each with the same weight.",
        f"{data['num_too_short']:,} were too short to be scored and skipped; {data['num_truncated']:,} were cut off at "
        f"{length} tokens.",
    ]


def _directions(results: tuple[Result, ...]) -> list[str]:
    values = results[0].values
    moves = " and ".join(dict.fromkeys(setting(result.values["relative_step"]) for result in results))
    scaled = _SCALED[values["normalize"]]
    if values["global_renorm"] and values["normalize"] != "global":
        scaled += ", then to norm 1"
    same = " Both models have the same draws, each scaled to its own weights." if len(results) > 1 else ""
    if len(results) > 1 and values["normalize"] == "global":
        same = " Both models have the same directions."
    return [
        f"{counted(results[0].num, 'direction')} d, drawn from the {values['distribution']} distribution and {scaled}. "
        f"A step of h = {setting(results[0].span)} moves θ by {moves} of its own norm.{same}",
        f"Seed {values['seed']}, key {values['key']}; direction i depends on the key, on i and on the norms of θ only.",
    ]


def _formulas(results: tuple[Result, ...]) -> list[str]:
    result = results[0]
    lines = [
        f"h = {setting(result.span)}, L₀ = L(θ), L₊ = L(θ + h d), L₋ = L(θ − h d)",
        "loss change: L₊ − L₀; roughness: sd(L₊) / |mean(L₊)|",
    ]
    if result.has("slopes"):
        lines += ["slope: s = ∇L · d; gradient-delta correlation: Pearson’s r of s and L₊ − L₀"]
    if result.has("curvatures"):
        exact = (
            "by a product with the Hessian" if result.values.get("num_matvecs") else "by forward differentiation twice"
        )
        formula = f"dᵀ∇²L d, {exact}" if result.is_exact else "(L₊ + L₋ − 2 L₀) / h²"
        lines += [f"curvature: c = {formula}; per unit of distance: c / ‖d‖²"]
        lines += [] if result.is_exact else [_rounding(result)]
    if "curvature_truncation" in result.values:
        lines += [f"what the step does to c: 4/3 (c at h − c at h/2), {result.said('curvature_truncation')} on average"]
    return lines


def _rounding(result: Result) -> str:
    if "realised_displacement" in result.values:
        return (
            "rounding: √6 ε / h² + a rms(s) / h, with ε the error of a loss and a the part of the two steps that is not "
            "opposite, both measured"
        )
    dtype = result.model["compute_dtype"].removeprefix("torch.")
    return f"rounding: 4 u max|L| / h², with u the relative rounding error of {dtype}; an order of magnitude"


def _errors(results: tuple[Result, ...]) -> list[str]:
    return [
        "Standard errors are over directions: sd / √n for means, the jackknife for standard deviations, roughness and "
        "correlation, that of the order statistic for percentiles. Those over texts are the scatter of what single texts add "
        "to a statistic, to first order; both together count their interaction once. ± in the text is one standard error "
        f"{results[0].over}; the 95 % intervals of means are by Student’s t with it, over {results[0].num:,} directions or "
        "as many as are finite.",
        "They are about the same weights, not about another training run.",
    ]


def _cost(result: Result, models: int) -> str:
    values = result.values
    counts = {
        "evaluation": values["num_forwards"],
        "gradient": values["num_gradients"],
        "directional derivative": values["num_jvps"],
        "second directional derivative": values["num_second_jvps"],
        "Hessian product": values.get("num_matvecs", 0),
    }
    used = ", ".join(counted(num, what) for what, num in counts.items() if num)
    path = f"{values['chunk']} directions at a time" if values["fast_vec_path"] else "weights perturbed leaf by leaf"
    whose = f"{result.name}: " if models > 1 else ""
    return f"{whose}{used} of the loss over all texts; {path}, {counted(values['threads'], 'thread')}."


def _time(meta: dict[str, Any]) -> str:
    return f"{number(meta['seconds'], 2)} seconds in all."


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
