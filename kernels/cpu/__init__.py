"""Batch normalisation kernels for the CPU, written in Python for Numba. Nothing is imported here.

What calls them, and knows of arrays and threads, is fastbn/cpu.

| module | holds |
|---|---|
| `arguments`, `groups` | what the host passes; the groups of arguments that all kernels take |
| `planes`, `planes_backward` | channels first: forward_, stats_, normalise_planes; backward_, reduce_, apply_planes |
| `columns`, `columns_backward` | channels last, NC, short planes: the same of columns |
| `channels` | once a channel: finish_stats, finish_given, finish_backward, update_running |
| `sums`, `gradients`, `strips` | moments in the making; the backward's sums, and dx; strips of channels |
| `simd` | sixteen float64 or float32 lanes, and memory of any dtype |
| `team`, `desk`, `atomics` | programs of kernels; how threads share one; what threads need to meet |
| `variants`, `helpers`, `cache` | types and compilation; functions that exist only inside kernels; the disk cache |
"""
