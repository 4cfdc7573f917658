"""Batch normalisation kernels."""
