"""The CPU backend: NumPy arrays, our own threads, kernels compiled by Numba. Twin: fastbn/cuda."""
