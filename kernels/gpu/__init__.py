"""Kernels for GPUs, in Triton; importing this package does not import Triton."""
