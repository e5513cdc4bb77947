"""Measurements: one module a claim, peers beside us in the same run."""
