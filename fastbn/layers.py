"""The layer: parameters, running statistics and modes around the functions in `fastbn.functional`."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from fastbn import functional
from fastbn.arguments import scalars
from fastbn.conventions import CONVENTIONS, FIELDS, VECTORS, get_convention, overwrite, read_state, write_state
from fastbn.folding import fold_batch_norm
from fastbn.statistics import Array, Moments, namespace_of, namespace_on, num_channels


class BatchNorm:
    """Batch normalisation over every axis but one (Ioffe & Szegedy 2015, "Batch normalization", algorithms 1 and 2).

    Parameters
    ----------
    num_features : int
        C, the length of the channel axis.
    axis : int
        The channel axis: 1 for channels first, -1 for channels last.
    eps : float
        Added to the variance; finite and > 0.
    momentum : float or None
        Weight of the new batch in the running statistics, in [0, 1]. None is the cumulative average: the k-th batch
        has weight 1/k, each batch counting once.
    scale, center : bool
        Learn gamma, learn beta. What is not learnt is None and appears in no dict below.
    track_running_stats : bool
        Keep running statistics for `eval`. Without them evaluation uses the batch's statistics too.
    activation : None or "relu"
        Applied after ``+ residual``.
    dtype : float32 or float64
        Of parameters, gradients and running statistics. The input may have another floating dtype.
    device : str
        "cpu" (NumPy), "cuda" or "cuda:1" (CuPy).

    Attributes
    ----------
    gamma, beta, dgamma, dbeta, running_mean, running_var : array, (C,), or None
        The gradients are those of the last `backward`, overwritten in place by the next one; zeros before the first.
    num_batches_tracked, training : int, bool
        Training batches that entered the running statistics; the mode, see `train` and `eval`.
    unbiased, convention : bool, str
        Whether running_var takes the factor n/(n-1), and whose names `state_dict` uses: True and "torch", or as `like`
        sets them.
    ctx : Context or None
        What `backward` needs of the last forward. It holds the input by reference; set it to None to let go of it.

    Raises
    ------
    ValueError, TypeError, ImportError
        For parameters out of range, of the wrong type, or a CUDA device without CuPy.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(3, activation="relu")
    >>> x = np.random.default_rng(0).normal(5, 2, (8, 3, 4, 4)).astype(np.float32)
    >>> y = bn(x)
    >>> dx = bn.backward(np.ones_like(y))
    >>> for name, p in bn.parameters().items():
    ...     p -= 0.1 * bn.gradients()[name]
    >>> bn.eval()(x).shape, bn.num_batches_tracked
    ((8, 3, 4, 4), 1)
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        scale: bool = True,
        center: bool = True,
        track_running_stats: bool = True,
        activation: str | None = None,
        dtype: Any = np.float32,
        device: str = "cpu",
    ) -> None:
        self.num_features = num_channels(num_features)
        self.axis = scalars.whole(axis, "axis")
        self.eps = scalars.eps(eps)
        self.momentum = None if momentum is None else scalars.momentum(momentum)
        scalars.activation(activation)
        self.activation = activation
        self.dtype = scalars.parameter_dtype(dtype)
        self.device = device
        self.unbiased, self.convention = True, "torch"
        self.training, self.num_batches_tracked = True, 0
        self.ctx: Any = None

        xp, on_device = namespace_on(device)
        with on_device:
            ones = partial(xp.ones, self.num_features, self.dtype)
            zeros = partial(xp.zeros, self.num_features, self.dtype)
            self.gamma: Array | None = ones() if scale else None
            self.beta: Array | None = zeros() if center else None
            self.dgamma: Array | None = zeros() if scale else None
            self.dbeta: Array | None = zeros() if center else None
            self.running_mean: Array | None = zeros() if track_running_stats else None
            self.running_var: Array | None = ones() if track_running_stats else None

    @classmethod
    def like(cls, convention: str, num_features: int, **overrides: Any) -> BatchNorm:
        """A layer with another framework's defaults: eps, momentum, running_var's n/(n-1), and state-dict names.

        `convention` is "torch", "keras", "flax", "chainer" or "onnx". `overrides` are arguments of the constructor, and
        `unbiased`; momentum keeps its meaning here, the weight of the new batch: what Keras writes as 0.99 is 0.01.

        Examples
        --------
        >>> import fastbn
        >>> bn = fastbn.BatchNorm.like("keras", 64, axis=-1)
        >>> bn.eps, bn.momentum, bn.unbiased, list(bn.state_dict())
        (0.001, 0.01, False, ['gamma', 'beta', 'moving_mean', 'moving_variance'])
        """
        defaults = get_convention(convention)
        unbiased = bool(overrides.pop("unbiased", defaults.unbiased))
        layer = cls(num_features, **{"eps": defaults.eps, "momentum": defaults.momentum, **overrides})
        layer.unbiased, layer.convention = unbiased, convention
        return layer

    def __call__(
        self,
        x: Array,
        residual: Array | None = None,
        sample_weight: Array | None = None,
        update_stats: bool = True,
        out: Array | None = None,
    ) -> Array:
        """Normalise x by the batch's statistics in training, by the running ones in evaluation.

        Parameters
        ----------
        x, residual, out : array, C channels along `axis`
            The optional residual is added before the activation; y is written into out, if given.
        sample_weight : array, x's shape without the channel axis, or (N,), optional
            Weights of the values in the statistics.
        update_stats : bool
            False leaves running statistics and counter alone: for recomputing a forward (gradient checkpointing).

        Returns
        -------
        array of x's shape, dtype and memory order
            Errors as in `fastbn.batch_norm_forward`; after any exception the layer is as before.
        """
        self._check_features(x)
        mean, var = self.running_mean, self.running_var
        training = self.training or mean is None
        update = training and update_stats and mean is not None
        if training and not update:  # running statistics are neither read nor written
            mean = var = None
        momentum = 1.0 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum
        y, self.ctx = functional.batch_norm_forward(
            x, self.gamma, self.beta, mean, var, training=training, momentum=momentum, eps=self.eps, axis=self.axis, unbiased=self.unbiased,
            activation=self.activation, residual=residual, sample_weight=sample_weight, out=out,
        )  # fmt: skip
        if update and y.size:  # an empty batch is no batch
            self.num_batches_tracked += 1
        return y

    def backward(self, dy: Array, out: Array | None = None) -> Any:
        """Gradients for the last forward; after a forward in evaluation the frozen ones (statistics are constants).

        Parameters
        ----------
        dy, out : array of y's shape and dtype
            out is optional and may be dy itself.

        Returns
        -------
        dx : array
            Or the pair (dx, dresidual) if the forward had a residual. `dgamma` and `dbeta` are filled.

        Raises
        ------
        RuntimeError
            Before any forward. Other errors as in `fastbn.batch_norm_backward`.
        """
        if self.ctx is None:
            raise RuntimeError("backward needs a forward pass before it: call y = bn(x), then bn.backward(dy)")
        dx, dgamma, dbeta, *dresidual = functional.batch_norm_backward(dy, self.ctx, out=out)
        if self.dgamma is not None:
            self.dgamma[...] = dgamma
        if self.dbeta is not None:
            self.dbeta[...] = dbeta
        return (dx, *dresidual) if dresidual else dx

    def train(self, mode: bool = True) -> BatchNorm:
        """Use batch statistics and update the running ones (mode=False: as `eval`); returns the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Use the running statistics (the batch's where none are tracked); returns the layer."""
        return self.train(False)

    def parameters(self) -> dict[str, Array]:
        """The learnt arrays, "gamma" then "beta", themselves: what is written into them changes the layer."""
        return {name: p for name, p in (("gamma", self.gamma), ("beta", self.beta)) if p is not None}

    def gradients(self) -> dict[str, Array]:
        """The gradients by the names of `parameters`, themselves: each `backward` overwrites them in place."""
        return {name: g for name, g in (("gamma", self.dgamma), ("beta", self.dbeta)) if g is not None}

    def state_dict(self, convention: str | None = None) -> dict[str, Array]:
        """Copies of parameters and running statistics, named as a framework names them: `load_state_dict` reads them.

        The names are those of `convention` ("torch", "keras", "flax", "chainer", "onnx"), by default the layer's own: "torch", or
        what `like` was given. The batch counter, which Keras, Flax and ONNX lack, is a 0-d int64 NumPy array.
        """
        return write_state(self.convention if convention is None else convention, self._state())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> str:
        """Read a checkpoint of any of the five conventions into the layer's arrays; returns the convention's name.

        Names may have a common prefix; values are arrays, sequences or PyTorch tensors, (C,). A checkpoint without a
        batch counter leaves the layer's as it is. eps, momentum and `unbiased` are in no checkpoint: `like` sets them.

        Raises
        ------
        ValueError, TypeError
            For unknown, missing or surplus keys, wrong shapes, values that are not real numbers, finite ones that the layer's dtype
            cannot hold, a negative variance, an array of the layer that is read-only. After any exception the layer is as before.
        """
        convention, values = read_state(state_dict, self._state(), self.num_features, self.dtype)
        counter = values.pop("num_batches_tracked", self.num_batches_tracked)
        xp, on_device = namespace_on(self.device)
        with on_device:
            new = {field: xp.asarray(value) for field, value in values.items()}
            overwrite(self, new | {"num_batches_tracked": counter})
        return convention.name

    def fold(self, conv_weight: Array, conv_bias: Array | None = None, axis: int = 0) -> tuple[Array, Array]:
        """Weight and bias of one layer that does what the one before and this one in evaluation do together.

        The activation is not folded: apply it after. `axis` and errors as in `fastbn.fold_batch_norm`; ValueError
        without running statistics.
        """
        if self.running_mean is None:
            raise ValueError("nothing to fold: the layer tracks no running statistics (track_running_stats=False)")
        mean, var = self.running_mean, self.running_var
        return fold_batch_norm(conv_weight, conv_bias, self.gamma, self.beta, mean, var, eps=self.eps, axis=axis)

    def recalibrate(self, batches: Iterable[Array], progress: bool = False) -> BatchNorm:
        """Set the running statistics to the exact ones of a whole data set, whatever its batches' sizes; returns self.

        Parameters
        ----------
        batches : iterable of arrays
            Inputs of this layer; empty ones are skipped. `num_batches_tracked` becomes their number.
        progress : bool
            Show a progress bar (tqdm, in the extra ``fastbn[demo]``).

        Raises
        ------
        ValueError, ImportError
            For fewer than two values per channel in all, another number of channels, a layer without running statistics, read-only
            ones, or a missing tqdm. After any exception the layer is as before. A channel of non-finite statistics keeps its running
            values (RuntimeWarning).

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(1).recalibrate([np.array([[1.0], [2.0], [3.0]]), np.array([[6.0]])])
        >>> bn.running_mean.tolist(), round(float(bn.running_var[0]), 4)
        ([3.0], 4.6667)
        """
        if self.running_mean is None or self.running_var is None:
            raise ValueError("the layer tracks no running statistics (track_running_stats=False)")
        if progress:
            try:
                batches = importlib.import_module("tqdm").tqdm(batches, desc="recalibrate", unit="batch")
            except ImportError as error:
                raise ImportError("progress=True needs tqdm: pip install 'fastbn[demo]'") from error
        total, count = Moments.empty(self.num_features), 0
        for x in batches:
            self._check_features(x)
            batch = functional.moments(x, axis=self.axis)
            total += batch
            count += batch.count > 0
        if total.count < 2:
            raise ValueError(f"the batches hold {total.count:.0f} values per channel; statistics need at least 2")
        with np.errstate(over="ignore"):  # what overflows the cast is reported below
            mean, var = total.mean.astype(self.dtype), total.var(ddof=int(self.unbiased)).astype(self.dtype)
        usable = (abs(mean) < np.inf) & (var < np.inf)
        if not bool(usable.all()):
            bad = f"{self.num_features - int(usable.sum())} of {self.num_features} channels have statistics that are not finite in"
            warnings.warn(f"{bad} {self.dtype} and keep their running values; look for NaN or inf", RuntimeWarning, stacklevel=2)
        xp = namespace_of(mean)
        new_mean, new_var = xp.where(usable, mean, self.running_mean), xp.where(usable, var, self.running_var)
        overwrite(self, {"running_mean": new_mean, "running_var": new_var, "num_batches_tracked": count})
        return self

    def _check_features(self, x: Array) -> None:
        """ValueError if x has another number of channels. What is no array at all, the functions explain better."""
        try:
            found = x.shape[self.axis]
        except (AttributeError, IndexError, TypeError):
            return
        if found != self.num_features:
            raise ValueError(
                f"the layer has num_features={self.num_features}, but x of shape {x.shape} has {found} "
                f"channels along axis {self.axis}; build BatchNorm({found}) or set axis to x's channel axis"
            )

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds, live, by the names in `FIELDS`."""
        fields = VECTORS if self.running_mean is None else FIELDS
        return {field: getattr(self, field) for field in fields if getattr(self, field) is not None}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: everything but the context of the last forward, which holds that input."""
        return {**self.__dict__, "ctx": None}

    def __repr__(self) -> str:
        """The expression that makes such a layer; parameters and statistics are in `state_dict`."""
        arguments: dict[str, Any] = {
            "axis": self.axis,
            "eps": self.eps,
            "momentum": self.momentum,
            "scale": self.gamma is not None,
            "center": self.beta is not None,
            "track_running_stats": self.running_mean is not None,
        }
        usual = {"activation": None, "dtype": "float32", "device": "cpu"}
        unusual = {"activation": self.activation, "dtype": self.dtype.name, "device": self.device}
        arguments |= {name: value for name, value in unusual.items() if value != usual[name]}
        make = f"BatchNorm({self.num_features}"
        if (self.convention, self.unbiased) != ("torch", True):  # which the constructor does not take
            make = f"BatchNorm.like({self.convention!r}, {self.num_features}"
            known = CONVENTIONS.get(self.convention)
            if known is None or known.unbiased != self.unbiased:
                arguments["unbiased"] = self.unbiased
        return ", ".join([make, *(f"{name}={value!r}" for name, value in arguments.items())]) + ")"
