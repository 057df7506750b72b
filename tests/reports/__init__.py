"""Analyses, as data, as a page, compared."""
