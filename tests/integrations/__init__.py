"""Curvature in training loops."""
