"""Kernels for the CPU, written in Python for Numba. Nothing is imported here."""
