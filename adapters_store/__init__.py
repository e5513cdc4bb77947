"""Adapters as files: looked at, verified, compared, merged into a base, made from other formats."""
