"""The GPU backend: CuPy arrays, streams, kernels compiled by numba-cuda. Importing it imports neither. Twin: fastbn/cpu."""
