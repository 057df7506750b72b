"""An operator examined as a whole: numbers with their errors, as data, as a page, compared."""

from .analysis import PARTS, Analysis, analyze
from .comparison import Comparison, Row, compare
from .page import render

__all__ = ["PARTS", "Analysis", "Comparison", "Row", "analyze", "compare", "render"]
