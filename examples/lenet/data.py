"""The data sets: scikit-learn's handwritten digits, or a folder of IDX files."""

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits as sklearn_digits

from lenet.idx import DataError, load_idx_folder

TEST_IMAGES = 500  # of the 1797 digits


@dataclass(frozen=True)
class Dataset:
    """Images as float32 (N, 1, side, side), labels as int64 (N,) from 0 to classes - 1.

    The images are shifted and scaled as one block so that the training pixels have mean 0 and standard deviation 1. On
    pixels in [0, 1] the network without BatchNorm stays at chance for dozens of epochs, which would show nothing but that.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def side(self):
        return self.train_images.shape[2]

    @property
    def classes(self):
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1

    def on(self, xp):
        """The same with its arrays in xp's memory."""
        arrays = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return Dataset(self.name, *(xp.asarray(a) for a in arrays))


def load_digits():
    """scikit-learn's 1797 digits (no download): 8 x 8 pixels, each doubled to 16 x 16, the least this LeNet works on.

    1297 are for training, 500 for the test, split once by a fixed permutation: the same for every seed of the training.
    """
    bunch = sklearn_digits()
    images = bunch.images.repeat(2, axis=1).repeat(2, axis=2)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return _dataset("scikit-learn's digits", images[train], bunch.target[train], images[test], bunch.target[test])


def load_folder(folder):
    """A folder of IDX files, as `lenet.idx.load_idx_folder` reads it.

    Raises
    ------
    DataError
        Also for images of a size that this LeNet cannot take, and for images that are all one grey.
    """
    train_images, train_labels, test_images, test_labels = load_idx_folder(folder)
    h, w = train_images.shape[1:]
    if h != w or h % 4 or h < 12:
        raise DataError(
            f"{folder} holds images of {h} x {w}; this LeNet takes squares whose side is a multiple of 4 and at least 12, "
            "such as MNIST's 28 x 28"
        )
    if train_images.min() == train_images.max():
        raise DataError(f"{folder}: every pixel of the training images is {train_images.max()}; download the files again")
    return _dataset(str(folder), train_images, train_labels, test_images, test_labels)


def _dataset(name, train_images, train_labels, test_images, test_labels):
    """A Dataset of images (N, H, W) in any range."""
    mean, std = train_images.mean(dtype=np.float64), train_images.std(dtype=np.float64)

    def scaled(images):
        return ((images[:, None] - np.float32(mean)) / np.float32(std)).astype(np.float32)

    return Dataset(
        name,
        scaled(train_images),
        train_labels.astype(np.int64),
        scaled(test_images),
        test_labels.astype(np.int64),
    )
