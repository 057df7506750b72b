"""Risk: model, loss and data as weighted scalar functions of a dict of parameters."""

from ..marker import inputs, outputs
from .averaging import BATCHES, SAMPLES, TOTAL, Average
from .empirical import EmpiricalRisk, Term
from .losses import autoencoder, hugging_face, supervised

__all__ = [
    "BATCHES",
    "SAMPLES",
    "TOTAL",
    "Average",
    "EmpiricalRisk",
    "Term",
    "autoencoder",
    "hugging_face",
    "inputs",
    "outputs",
    "supervised",
]
