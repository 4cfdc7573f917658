"""The plan of calls on GPU arrays that are alike: which arrays kernels reach in place, and which kernels run. Twin: fastbn/cpu/plan.py."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from fastbn.common.plan import Plan
from fastbn.cuda import dispatch
from fastbn.cuda.layout import Channels, Layout, channels


class GpuPlan(Plan):
    """What the GPU's backend adds to a `Plan`. Making a forward's needs no kernel; `setting` and `steps` do.

    Attributes
    ----------
    weighted : bool
        Sample weights were given, to the forward where this is a backward's.
    reach : list of (int, int)
        The memory of each array, counted from its address, in the order of `seen`.
    parameters, statistics : Channels
        gamma and beta; running statistics, or mean and var.
    layout : Layout
        How kernels read x, and all arrays of its shape; a backward's is its forward's. Only where x is not empty, as what follows.
    direct : set of str
        The arrays of x's shape that kernels read and write in place.
    """

    backend: Any  # fastbn.cuda.backend, which sets it
    forward: GpuPlan | None
    layout: Layout

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        seen, before = self.seen, self.forward
        self.weighted = "sample_weight" in (before or self).seen
        self.reach = [a.reach for a in seen.values()]
        if before is not None:
            self.has_residual, self.relu = before.has_residual, before.relu
        names = ("mean", "var") if self.operation == "inference" else ("running_mean", "running_var")
        self.parameters, self.statistics = self._channels("gamma", "beta"), self._channels(*names)
        if self.empty:
            return
        self.layout = Layout(seen["x"], self.axis, self.dtype) if before is None else before.layout
        self.direct = {name for name in ("x", "residual", "dy", "out") if name in seen and self.layout.fits(seen[name])}
        if before is not None and self.relu and before.setting.plan.lanes > 1:
            # The activation's bits lie in the order in which the forward has worked, so its backwards work in vectors too, on copies.
            self.direct = {name for name in self.direct if not seen[name].offset}

    def _channels(self, *names: str) -> Channels:
        """How kernels take the per-channel arrays of these names; the parameters of a backward are its forward's."""
        seen = self.seen if self.forward is None else self.forward.seen
        return channels({name: seen[name] for name in names if name in seen})

    @cached_property
    def setting(self) -> dispatch.Setting:
        """How kernels work on the data. Arrays off a 16-byte boundary are read one value at a time; what CuPy allocates is on one."""
        off, before = any(self.seen[name].offset for name in self.direct), self.forward
        if before is not None and (not off or before.setting.plan.lanes == 1):
            return before.setting
        return dispatch.setting(self.dtype, self.layout.shape, not off)

    @cached_property
    def steps(self) -> dispatch.Steps:
        """The kernels that run."""
        s, before, relu, residual = self.setting, self.forward, self.relu, self.has_residual
        parameters, running = (c.dtype.name for c in (self.parameters, self.statistics))
        if before is not None:
            frozen = not before.training
            weighted = self.weighted and not frozen
            if self.operation == "reduce":
                return dispatch.reduce(s, "float32", weighted, relu)
            if self.operation == "apply":
                return dispatch.apply(s, frozen, weighted, relu, residual)
            return dispatch.backward(s, parameters, frozen, weighted, relu, residual)
        if self.operation == "inference":
            return dispatch.inference(s, parameters, running, relu, residual)
        if self.operation == "moments":
            return dispatch.moments(s, self.weighted)
        if self.operation == "forward_apply":  # statistics are given, as the float64 arrays of a Moments
            return dispatch.forward(s, parameters, "float64", False, False, relu, residual)
        return dispatch.forward(s, parameters, running, self.training, self.weighted and self.training, relu, residual)
