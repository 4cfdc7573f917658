"""Reader of IDX files, the format of MNIST and Fashion-MNIST.

A file is two zero bytes, a byte for the type (8: unsigned bytes), a byte for the number of dimensions, each dimension
as a big-endian 32-bit integer, and the values: http://yann.lecun.com/exdb/mnist
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

UNSIGNED_BYTES = 8
GZIP_MAGIC = b"\x1f\x8b"
MOST_VALUES = 2**31  # four times the largest file in this form (EMNIST); a damaged header may promise 2**96


class DataError(Exception):
    """A data file is missing or not what it should be; the message names the file, what was expected, what to do."""


def load_idx_folder(folder):
    """The four files of MNIST, Fashion-MNIST or any other data set in their form.

    Parameters
    ----------
    folder : str or path
        Holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each
        plain or with .gz.

    Returns
    -------
    train_images, train_labels, test_images, test_labels : uint8 arrays, (N, H, W) and (N,)

    Raises
    ------
    DataError
        A file is missing, cannot be read, is no IDX file, is truncated or too long; labels and images do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; --data takes the folder with the four IDX files of MNIST or Fashion-MNIST")
    train_path, train_images, train_labels = _load_pair(folder, "train")
    test_path, test_images, test_labels = _load_pair(folder, "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{test_path} holds images of {_by(test_images.shape[1:])}, {train_path} of {_by(train_images.shape[1:])}; "
            "both must have one size: take all four files from one data set"
        )
    return train_images, train_labels, test_images, test_labels


def read_idx(path, ndim):
    """One IDX file of unsigned bytes, plain or gzipped (told by its first bytes, not by its name).

    Parameters
    ----------
    path : str or path
    ndim : int
        Expected number of dimensions: 3 for images, 1 for labels.

    Returns
    -------
    uint8 array with ndim dimensions

    Raises
    ------
    DataError
    """
    path = Path(path)
    expected = bytes([0, 0, UNSIGNED_BYTES, ndim])
    kind = "images" if ndim == 3 else "labels"
    try:
        with _open(path) as file:
            magic = file.read(4)
            if magic != expected:
                raise DataError(
                    f"{path} begins with the bytes [{magic.hex(' ')}]{_guess(magic)}; an IDX file of {kind} begins with "
                    f"[{expected.hex(' ')}]: replace it by the {kind} of MNIST or Fashion-MNIST"
                )
            header = file.read(4 * ndim)
            if len(header) < 4 * ndim:
                raise DataError(f"{path} ends within its header of {4 + 4 * ndim} bytes: download it again")
            shape = tuple(int(d) for d in np.frombuffer(header, ">u4"))
            if math.prod(shape) > MOST_VALUES:
                raise DataError(f"{path} is damaged: its header promises {_by(shape)} bytes of {kind}: download it again")
            # One byte more than promised, so that a file that is too long is noticed and never read in full.
            values = file.read(math.prod(shape) + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a truncated or damaged gzip file ({error}): download it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): check the file and its permissions") from error
    if len(values) != math.prod(shape):
        found = f"only {len(values)} follow" if len(values) < math.prod(shape) else "more follow"
        raise DataError(
            f"{path} is damaged: its header promises {_by(shape)} = {math.prod(shape)} bytes of {kind}, but {found}: "
            "download it again"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _load_pair(folder, part):
    """Path of the images, images (N, H, W) and labels (N,) of one part, "train" or "t10k"."""
    images_path = _find(folder, f"{part}-images", "idx3-ubyte")
    labels_path = _find(folder, f"{part}-labels", "idx1-ubyte")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path} holds {len(labels)} labels for the {len(images)} images of {images_path}; "
            "there must be one label an image: take both files from one data set"
        )
    if images.size == 0:
        raise DataError(f"{images_path} holds no images (its header says {_by(images.shape)}): download it again")
    return images_path, images, labels


def _find(folder, stem, ending):
    """The first file there is of the names in use: a dash or, from some unpackers, a dot before the ending."""
    names = [f"{stem}{separator}{ending}{gz}" for separator in "-." for gz in ("", ".gz")]
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise DataError(
        f"{folder / names[0]} (or {names[1]}) is missing; --data needs the images and labels of both parts, train and "
        "t10k: download the four files of MNIST or Fashion-MNIST into that folder"
    )


def _open(path):
    """The file, unpacked while it is read if it is a gzip file."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP_MAGIC
    return gzip.open(path, "rb") if packed else path.open("rb")


def _guess(magic):
    """What a file that is no such IDX file may be, for the message."""
    if not magic:
        return ", it is empty"
    if magic.lstrip()[:1] == b"<":
        return ", an HTML page by the looks of it"
    if len(magic) == 4 and magic[:3] == bytes([0, 0, UNSIGNED_BYTES]):
        return f", an IDX file with {magic[3]} dimension{'s' * (magic[3] != 1)}"
    return ""


def _by(shape):
    return " x ".join(str(d) for d in shape)
