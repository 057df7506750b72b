"""Tests of Hessians of models over data."""
