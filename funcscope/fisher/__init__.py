"""Fisher information of tasks: spectra of gradients' second moments by block."""

from .accumulators import Ema, Welford
from .precomputed import gradient_gram
from .spectrum import fisher_spectrum, gram_spectrum
from .spectrum_result import GramSpectrum

__all__ = ["Ema", "GramSpectrum", "Welford", "fisher_spectrum", "gradient_gram", "gram_spectrum"]
