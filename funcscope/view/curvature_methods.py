"""How stored curvature was made: what each number is, its error, its price, and what it does not say."""

from __future__ import annotations

from typing import Any

from ..study.curvature_table import cost
from .curvature_result import Curvature
from .directional_methods import scored
from .numbers import counted, number, setting
from .page import Terms

_METHODS = {
    "xtrace": "XTrace: exact on the part of the matrix that the other test vectors find, Hutchinson’s estimate on the rest",
    "hutchinson": "Hutchinson’s estimate, the mean of zᵀAz over random signs z: XTrace’s vectors would not fit the memory",
    "exact": "the sum of all diagonal entries, without an error",
}


def terms(found: Curvature) -> Terms:
    """The block that a reader needs to make the numbers again, and not to read too much into them."""
    meta = found.meta
    settings = ", ".join(f"{name} {_plain(value)}" for name, value in meta["settings"].items() if value is not None)
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return Terms(
        [
            ("Model", [_model(found)]),
            ("Texts", _texts(found)),
            ("Matrix", _matrix(found)),
            ("Eigenvalues", [_ends(found)]),
            ("Density", [_density(found)]),
            ("Trace", _trace(found)),
            ("Sharpness", _sharpness(found)),
            ("Errors", _errors(found)),
            ("Cost", [cost(meta), f"{number(meta['seconds'], 2)} seconds in the last call."]),
            ("Settings", [settings]),
            ("Versions", [versions]),
        ]
    )


def _model(found: Curvature) -> str:
    model = found.model
    stored, computed = (model[name].removeprefix("torch.") for name in ("dtype", "compute_dtype"))
    return (
        f"{model['name']}: {model['class']}, {model['num_parameters']:,} parameters of norm "
        f"{number(found.meta['cost']['param_norm'], 4)} in {stored}, computed in {computed}, attention "
        f"{model['attention']}, eval mode, from {model['folder']}."
    )


def _texts(found: Curvature) -> list[str]:
    data = found.meta["data"]
    what, how = scored(data["task"])
    batches = f"{data['num_batches']:,} " + ("batch" if data["num_batches"] == 1 else "batches")
    return [
        f"{data['path']}: {counted(data['num_samples'], 'text')} in {batches}, {data['num_tokens']:,} tokens. "
        f"Scored are {data['num_scored']:,} {what}, {how}; the loss is their mean cross-entropy in nats, "
        f"{number(found.model['values']['baseline_loss'], 5)} at the weights.",
        f"{data['num_too_short']:,} were too short and skipped; {data['num_truncated']:,} were cut off at "
        f"{found.model['max_seq_length']} tokens. All curvature here is that of these texts alone, and exact for them: few "
        "texts have a larger top eigenvalue than many.",
    ]


def _matrix(found: Curvature) -> list[str]:
    kinks = (
        "For a network with ReLU this is the curvature of its linear pieces: kinks between pieces bend the loss along a "
        "finite step too, and are not in the Hessian."
    )
    graph = "with the graph kept" if found.settings["keep"] else "with the graph made again for every product"
    if found.settings["matrix"] == "ggn":
        return [
            f"G = mean over tokens of JᵀMJ, {graph}: J the Jacobian of the logits, M = diag p − ppᵀ. It is the Hessian "
            "without the curvature of the model itself, has no negative eigenvalue beyond rounding, and is the Fisher "
            "information of a cross-entropy. The curvatures in the table of sharpness are those of the Hessian."
        ]
    return [f"H = ∇²L(θ), by products Hv, exact up to rounding, {graph}. {kinks}"]


def _ends(found: Curvature) -> str:
    ends = found.summary.ends
    return (
        "Lanczos from a random start with full orthogonalisation. The residual is ‖Ay − θy‖ of the Ritz pair (θ, y), up to "
        "rounding: an eigenvalue lies that near. Converged is what has a small residual for its own end and, by a fresh "
        "random start beside it, none before it that was missed, but for a chance of 1 %; the rank of others is open. "
        f"{ends.num_matvecs} products. The damping of the condition number, "
        f"{number(found.summary.condition_number)}, is {number(found.summary.damping)}."
    )


def _density(found: Curvature) -> str:
    density = found.summary.density
    kept = "" if density.steps <= _vectors(found) else ", without orthogonalisation (memory)"
    return (
        f"Stochastic Lanczos quadrature: {density.num_probes} normal starts of {density.steps} products{kept}, "
        f"{density.num_matvecs} in all. Nodes are no eigenvalues; away from the ends they smear. The negative share "
        f"counts what is below −{number(density.rounding, 2)} of the largest node, and converges slowly in the products per "
        "start."
    )


def _vectors(found: Curvature) -> int:
    wide = 8 if found.model["compute_dtype"].endswith("float64") else 4
    return int(found.settings["memory"] * 2**30 / (wide * found.num))


def _trace(found: Curvature) -> list[str]:
    trace = found.summary.trace
    lines = [f"{_METHODS[trace.method]}; {trace.num_matvecs} products."]
    if found.blocks:
        lines.append(
            f"Traces of blocks: zᵦᵀ(Az)ᵦ over {found.settings['block_products']} random signs z, all blocks from one sweep; "
            "their errors hold the coupling between blocks. Shares are ratios over the same products."
        )
    return lines


def _sharpness(found: Curvature) -> list[str]:
    return [
        f"SAM: L(θ + εg/‖g‖) − L(θ), ε = {setting(found.settings['epsilon'])}, g the gradient. ASAM: the same in units of "
        "each weight, ρ = 0.5; its slope and curvature are those along its own step. Average case: the mean rise over random "
        "steps in opposite pairs, 5 % of the norm of the weights long; its curvature part is ε² tr H / 2P, from the trace "
        "above. Slope is ε‖g‖, curvature ε²ĝᵀHĝ / 2 with ĝ = g/‖g‖. SAM is no estimate of the largest eigenvalue: ε²λ/2 "
        "holds at a stationary point only.",
        "Critical sharpness: 2 over the learning rate at which a step along −g stops lowering the loss, within the interval.",
    ]


def _errors(found: Curvature) -> list[str]:
    data = (
        "Eigenvalues over texts: the scatter of what single texts add, vᵀHᵢv with v held fixed, to first order; their "
        "intervals have the residual added and the bias of few texts taken off, by Student’s t. Trace, ranks and shares have "
        "errors about other random vectors on the same texts only."
    )
    return [
        "± is one standard error, intervals in figures are 1.96 of them: over random starts for the density and what is read "
        "off it, over left-out test vectors for XTrace (a little low at few products), over products for blocks, over "
        "sequences for SAM, ASAM and critical sharpness.",
        data if found.has_data_errors else "Nothing here is about other texts: errors are over random vectors only.",
    ]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
