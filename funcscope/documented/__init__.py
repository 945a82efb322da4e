"""The documents' own calls: a model and a batch in, the documented result out; a few lines over the pure functions.

`from ICLRMetrics import ICLRMetrics` in the documents is `from funcscope.documented import ICLRMetrics` here.
"""

from .directional import sample_directional_losses
from .fisher_spectral import FisherSpectral, SpectralConfig
from .flatness import compute_landscape_flatness
from .sharpness import compare_model_sharpness, compute_sam_sharpness
from .spectrum import compute_hessian_eigenvalues_lanczos

__all__ = [
    "FisherSpectral", "ICLRMetrics", "ModularityMetrics", "SpectralConfig", "compare_model_sharpness",
    "compute_hessian_eigenvalues_lanczos", "compute_landscape_flatness", "compute_sam_sharpness",
    "sample_directional_losses",
]  # fmt: skip


class ICLRMetrics:
    """The documents' class, for code that makes one: its methods are the functions of this module, and it keeps nothing."""

    sample_directional_losses = staticmethod(sample_directional_losses)
    compute_hessian_eigenvalues_lanczos = staticmethod(compute_hessian_eigenvalues_lanczos)
    compute_sam_sharpness = staticmethod(compute_sam_sharpness)


class ModularityMetrics:
    """The documents' other class for the same call."""

    compute_sam_sharpness = staticmethod(compute_sam_sharpness)
