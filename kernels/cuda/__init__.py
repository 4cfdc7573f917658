"""Batch normalisation kernels for NVIDIA GPUs, written in Python for numba-cuda. Nothing is imported here.

What calls them, and knows of arrays and streams, is fastbn/cuda.

| module | holds |
|---|---|
| `target`, `simulator` | which CUDA target Numba has; what its simulator lacks |
| `plan` | which kernels run for a shape, with how many blocks |
| `vectors`, `tiles`, `blocks`, `channels` | 16-byte accesses; a thread's, a block's, and a channel's part of the work |
| `weights` | sample weights |
| `planes`, `planes_backward` | channels first: stats_planes, normalise_planes; reduce_planes, apply_planes |
| `columns`, `columns_backward` | NC and channels last: stats_columns, normalise_columns; reduce_columns, apply_columns |
| `persistent` | channels that fit one block's registers: forward_planes, backward_planes, in one launch |
| `variants`, `launch` | every variant and its types; launching one |
| `ptx`, `__main__` | compiling without a GPU: `python -m fastbn.kernels.cuda --ptx DIR --cc 9.0` |

What has been checked: results on Numba's CUDA simulator against longdouble; code for compute capability 8.0 and 9.0 through NVVM
and ptxas. What has not: nothing here has run on a GPU yet, so there is no speed to report, and launching is untested.
"""
