"""Batch normalisation kernels: twins for the CPU (cpu) and for NVIDIA GPUs (cuda), formulas and rows of tables for both."""
