"""Formulas equal to ops of torch, made of ops that are twice differentiable, or faster.

Each takes what its op takes (the Python functions of torch.nn.functional hand a mode everything
after the tensors by keyword). It returns None where torch's own op is right, where the
arguments are invalid (torch then says so), or where no formula has the same derivatives.
"""
