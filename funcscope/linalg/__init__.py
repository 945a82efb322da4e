"""Matrix-free algorithms over any symmetric matvec: they know nothing of networks."""

from .algebra import added, dense, masked, principal, projected, scaled, shifted, to_scipy
from .cg import Solution, conjugate_gradient
from .diagonal import DiagonalEstimate, hutchinson_diagonal, xdiag
from .eigen import Eigenpairs, eigenpairs
from .kronecker import Kronecker
from .low_rank import SecondMoment, woodbury_power, woodbury_solve
from .matvec import Matvec, NonFinite, asymmetry
from .quadrature import spectral_density
from .quadrature_result import SpectralDensity
from .ranks import Ranks, matrix_ranks
from .spectral_mass import SpectralMass
from .summary import SpectrumSummary, spectrum_summary
from .trace import BlockTraces, TraceEstimate, block_traces, hutchinson_trace, hutchpp_trace, xtrace

__all__ = [
    "BlockTraces",
    "DiagonalEstimate",
    "Eigenpairs",
    "Kronecker",
    "Matvec",
    "NonFinite",
    "Ranks",
    "SecondMoment",
    "Solution",
    "SpectralDensity",
    "SpectralMass",
    "SpectrumSummary",
    "TraceEstimate",
    "added",
    "asymmetry",
    "block_traces",
    "conjugate_gradient",
    "dense",
    "eigenpairs",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hutchpp_trace",
    "masked",
    "matrix_ranks",
    "principal",
    "projected",
    "scaled",
    "shifted",
    "spectral_density",
    "spectrum_summary",
    "to_scipy",
    "woodbury_power",
    "woodbury_solve",
    "xdiag",
    "xtrace",
]
