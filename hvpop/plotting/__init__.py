"""Pictures of results that are readable without a caption; needs the extra ``plot``."""

from .convergence import plot_convergence
from .spectra import plot_density, plot_eigenvalues, plot_eigenvector

__all__ = ["plot_convergence", "plot_density", "plot_eigenvalues", "plot_eigenvector"]
