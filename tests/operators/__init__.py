"""Tests of operators: laws that all of them obey, SciPy's routines, algebra and errors."""
