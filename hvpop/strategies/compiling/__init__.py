"""Graphs: a product traced into ATen operations, simplified, split and made cheap to repeat."""
