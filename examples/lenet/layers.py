"""The layers of a LeNet, on plain arrays.

Every layer is used like `fastbn.BatchNorm`, so that both kinds stand in one list: ``y = layer(x)`` is the forward
pass, ``dx = layer.backward(dy)`` the backward pass, which also fills the gradients; ``layer.parameters()`` and
``layer.gradients()`` are dicts with the same names.

`xp` is the array module, numpy or cupy. Images are (N, C, H, W).
"""

import numpy as np


class Layer:
    """What a layer without parameters has; the others override it."""

    def parameters(self):
        return {}

    def gradients(self):
        return {}

    def train(self):
        return self

    def eval(self):
        return self


class Affine(Layer):
    """What convolution and dense layer share: a weight drawn by Xavier's rule and a bias that starts at 0.

    The uniform rule of Glorot & Bengio (2010), "Understanding the difficulty of training deep feedforward neural
    networks", equation 16: U(-a, a) with a = sqrt(6 / (fan_in + fan_out)). Drawn with NumPy and then moved, so that
    a seed means the same weights on every device.
    """

    def __init__(self, xp, rng, shape, bias, dtype):
        receptive = int(np.prod(shape[2:]))
        bound = np.sqrt(6 / ((shape[0] + shape[1]) * receptive))
        self.xp = xp
        self.weight = xp.asarray(rng.uniform(-bound, bound, shape), dtype)
        self.bias = xp.zeros(shape[0], dtype) if bias else None
        self.dweight = xp.zeros_like(self.weight)
        self.dbias = xp.zeros_like(self.bias) if bias else None

    def parameters(self):
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def gradients(self):
        return {"weight": self.dweight} if self.bias is None else {"weight": self.dweight, "bias": self.dbias}


class Dense(Affine):
    """y = x @ weight.T + bias, (N, inputs) -> (N, outputs); weight is (outputs, inputs)."""

    def __init__(self, xp, rng, inputs, outputs, bias=True, dtype=np.float32):
        super().__init__(xp, rng, (outputs, inputs), bias, dtype)

    def __call__(self, x):
        self.x = x
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def backward(self, dy):
        self.dweight = dy.T @ self.x
        if self.bias is not None:
            self.dbias = dy.sum(0)
        return dy @ self.weight


class Conv2d(Affine):
    """Convolution with stride 1 as a matrix product; weight is (outputs, inputs, kernel, kernel).

    The patches under the kernel become the columns of one matrix an image (`im2col`), so that the work is BLAS':
    y[n] = weight @ columns[n]. The product comes out as (N, C, H * W), which is NCHW without a transposition.
    """

    def __init__(self, xp, rng, inputs, outputs, kernel, padding=0, bias=True, dtype=np.float32):
        super().__init__(xp, rng, (outputs, inputs, kernel, kernel), bias, dtype)
        self.kernel, self.padding = kernel, padding

    def __call__(self, x):
        n, _, h, w = x.shape
        self.x_shape = x.shape
        self.columns = im2col(self.xp, x, self.kernel, self.padding)
        y = self.xp.matmul(self.weight.reshape(len(self.weight), -1), self.columns)
        if self.bias is not None:
            y += self.bias[:, None]
        shrink = self.kernel - 1 - 2 * self.padding
        return y.reshape(n, -1, h - shrink, w - shrink)

    def backward(self, dy):
        dy = dy.reshape(*dy.shape[:2], -1)  # (N, outputs, H * W)
        per_image = self.xp.matmul(dy, self.columns.transpose(0, 2, 1))
        self.dweight = per_image.sum(0).reshape(self.weight.shape)
        if self.bias is not None:
            self.dbias = dy.sum((0, 2))
        dcolumns = self.xp.matmul(self.weight.reshape(len(self.weight), -1).T, dy)
        return col2im(self.xp, dcolumns, self.x_shape, self.kernel, self.padding)


def im2col(xp, x, kernel, padding):
    """The patches of x, one a column: (N, C, H, W) -> (N, C * kernel * kernel, H' * W'), H' = H + 2 padding - kernel + 1.

    Row (c, i, j) of an image's matrix is channel c shifted by (i, j): kernel * kernel copies of slices.

    Examples
    --------
    >>> x = np.arange(6.0).reshape(1, 1, 2, 3)
    >>> im2col(np, x, kernel=2, padding=0)[0]
    array([[0., 1.],
           [1., 2.],
           [3., 4.],
           [4., 5.]])
    """
    n, c, h, w = x.shape
    if padding:
        padded = xp.zeros((n, c, h + 2 * padding, w + 2 * padding), x.dtype)
        padded[:, :, padding : padding + h, padding : padding + w] = x
        x = padded
    rows, cols = x.shape[2] - kernel + 1, x.shape[3] - kernel + 1
    columns = xp.empty((n, c, kernel, kernel, rows, cols), x.dtype)
    for i in range(kernel):
        for j in range(kernel):
            columns[:, :, i, j] = x[:, :, i : i + rows, j : j + cols]
    return columns.reshape(n, c * kernel * kernel, rows * cols)


def col2im(xp, columns, x_shape, kernel, padding):
    """The transpose of `im2col`: every value of x collects the gradients of all patches it was copied into."""
    n, c, h, w = x_shape
    rows, cols = h + 2 * padding - kernel + 1, w + 2 * padding - kernel + 1
    columns = columns.reshape(n, c, kernel, kernel, rows, cols)
    x = xp.zeros((n, c, h + 2 * padding, w + 2 * padding), columns.dtype)
    for i in range(kernel):
        for j in range(kernel):
            x[:, :, i : i + rows, j : j + cols] += columns[:, :, i, j]
    return x[:, :, padding : padding + h, padding : padding + w]


class AvgPool2d(Layer):
    """Mean of 2 x 2 windows, (N, C, H, W) -> (N, C, H / 2, W / 2); H and W are even."""

    def __call__(self, x):
        rows = x[:, :, ::2] + x[:, :, 1::2]
        return (rows[..., ::2] + rows[..., 1::2]) * 0.25

    def backward(self, dy):
        return (dy * 0.25).repeat(2, axis=2).repeat(2, axis=3)


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x)), written as (1 + tanh(x / 2)) / 2: exp would overflow for large negative x."""

    def __init__(self, xp):
        self.xp = xp

    def __call__(self, x):
        self.y = self.xp.tanh(x * 0.5) * 0.5 + 0.5
        return self.y

    def backward(self, dy):
        return dy * self.y * (1 - self.y)


class Flatten(Layer):
    """(N, C, H, W) -> (N, C * H * W)."""

    def __call__(self, x):
        self.x_shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy):
        return dy.reshape(self.x_shape)


def softmax_cross_entropy(xp, scores, labels):
    """Mean of -log softmax(scores)[label], and its gradient.

    Parameters
    ----------
    scores : floating array, (N, classes)
    labels : integer array, (N,)

    Returns
    -------
    loss : 0-d array
    dscores : array, (N, classes)
    """
    n = len(labels)
    shifted = scores - scores.max(1, keepdims=True)  # exp cannot overflow
    exps = xp.exp(shifted)
    sums = exps.sum(1, keepdims=True)
    picked = xp.arange(n), labels
    loss = (xp.log(sums[:, 0]) - shifted[picked]).mean()
    dscores = exps / sums
    dscores[picked] -= 1
    dscores /= n
    return loss, dscores
