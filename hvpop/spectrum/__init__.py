"""Spectra from products alone: eigenpairs with residuals, estimates with error bars."""

from .density import spectral_density
from .diagonal import diagonal
from .eigsh import eigsh
from .layers import Layerwise, layerwise
from .logdet import logdet
from .norms import frobenius_norm, spectral_norm
from .results import Density, DiagonalEstimate, Eigenpairs, Estimate
from .trace import trace

__all__ = [
    "Density",
    "DiagonalEstimate",
    "Eigenpairs",
    "Estimate",
    "Layerwise",
    "diagonal",
    "eigsh",
    "frobenius_norm",
    "layerwise",
    "logdet",
    "spectral_density",
    "spectral_norm",
    "trace",
]
