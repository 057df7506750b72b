"""Tests of the ways to differentiate twice."""
