"""The example's reader of IDX files (MNIST's format), on small files that the tests write."""

import gzip
import math
import sys
from pathlib import Path

import numpy as np
import pytest

# The examples are no installed package: `lenet` lies beside the script that uses it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from lenet.data import load_folder
from lenet.idx import MOST_VALUES, DataError, load_idx_folder, read_idx

PARTS = {"train": 6, "t10k": 3}  # images a part


def idx_bytes(values, kind=8):
    """An array as the bytes of an IDX file, written from the format's description, not by the reader's code."""
    header = bytes([0, 0, kind, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return header + values.astype(np.uint8).tobytes()


def images_of(part, side=12):
    return np.random.default_rng(PARTS[part]).integers(0, 256, (PARTS[part], side, side))


def labels_of(part):
    return np.arange(PARTS[part]) % 4


def write_folder(folder, gz=False, separator="-"):
    """The four files of a data set; the path of each by its stem."""
    paths = {}
    for part in PARTS:
        for kind, ndim, values in (("images", 3, images_of(part)), ("labels", 1, labels_of(part))):
            path = folder / f"{part}-{kind}{separator}idx{ndim}-ubyte{'.gz' * gz}"
            path.write_bytes(gzip.compress(idx_bytes(values)) if gz else idx_bytes(values))
            paths[f"{part}-{kind}"] = path
    return paths


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_folder_is_read(tmp_path, gz, separator):
    write_folder(tmp_path, gz, separator)
    arrays = load_idx_folder(tmp_path)
    expected = images_of("train"), labels_of("train"), images_of("t10k"), labels_of("t10k")
    for actual, wanted in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_dimensions_are_big_endian_and_last_axis_runs_fastest(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(bytes.fromhex("00000803 00000001 00000002 00000003 0a0b0c0d0e0f"))
    np.testing.assert_array_equal(read_idx(path, 3), [[[10, 11, 12], [13, 14, 15]]])


def test_gzip_is_told_by_its_bytes_not_by_its_name(tmp_path):
    packed, plain = tmp_path / "no-ending", tmp_path / "plain.gz"
    packed.write_bytes(gzip.compress(idx_bytes(labels_of("train"))))
    plain.write_bytes(idx_bytes(labels_of("train")))
    np.testing.assert_array_equal(read_idx(packed, 1), labels_of("train"))
    np.testing.assert_array_equal(read_idx(plain, 1), labels_of("train"))


def damaged(content, how):
    """One file's bytes, damaged, and what the message has to say."""
    if how == "cut in the values":
        return content[:-1], r"promises 6 x 12 x 12 = 864 bytes of images, but only 863 follow"
    if how == "too long":
        return content + b"\0", r"but more follow"
    if how == "cut in the header":
        return content[:9], r"ends within its header of 16 bytes"
    if how == "cut in the magic":
        return content[:2], r"begins with the bytes \[00 00\]; .* begins with \[00 00 08 03\]"
    if how == "empty":
        return b"", r"it is empty"
    if how == "labels":
        return idx_bytes(labels_of("train")), r"an IDX file with 1 dimension;"
    if how == "floats":
        return bytes([0, 0, 13, 3]) + content[4:], r"begins with the bytes \[00 00 0d 03\]"
    if how == "web page":
        return b"<!doctype html><title>404</title>", r"an HTML page"
    if how == "absurd size":
        return content[:4] + b"\xff" * 12, r"promises 4294967295 x 4294967295 x 4294967295 bytes"
    if how == "gz cut":
        return gzip.compress(content)[:-20], r"truncated or damaged gzip"
    if how == "gz flipped":
        packed = bytearray(gzip.compress(content))
        packed[-6] ^= 255  # in the checksum
        return bytes(packed), r"truncated or damaged gzip"
    assert how == "gz of a cut file"
    return gzip.compress(content[:-5]), r"but only 859 follow"


HOW = [
    *("cut in the values", "cut in the header", "cut in the magic", "empty", "too long", "absurd size"),
    *("labels", "floats", "web page", "gz cut", "gz flipped", "gz of a cut file"),
]


@pytest.mark.parametrize("how", HOW)
def test_damaged_file_is_named_with_what_was_expected_and_what_to_do(tmp_path, how):
    path = write_folder(tmp_path)["train-images"]
    content, message = damaged(path.read_bytes(), how)
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_idx_folder(tmp_path)
    assert str(path) in str(caught.value)
    assert "download it again" in str(caught.value) or "replace it" in str(caught.value)


def test_size_limit_lets_the_largest_known_file_pass():
    emnist_by_class = (697_932, 28, 28)
    assert math.prod(emnist_by_class) < MOST_VALUES


@pytest.mark.parametrize("stem", ["train-images", "train-labels", "t10k-images", "t10k-labels"])
def test_missing_file(tmp_path, stem):
    path = write_folder(tmp_path)[stem]
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} \(or {path.name}\.gz\) is missing.*download"):
        load_idx_folder(tmp_path)


def test_missing_folder_and_file_in_its_place(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(DataError, match=f"{name} is no folder; --data takes the folder"):
            load_idx_folder(tmp_path / name)


def test_folder_in_place_of_a_file_cannot_be_read(tmp_path):
    path = write_folder(tmp_path)["t10k-labels"]
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=f"{path.name} cannot be read"):
        load_idx_folder(tmp_path)


def test_labels_must_be_as_many_as_images(tmp_path):
    paths = write_folder(tmp_path)
    paths["t10k-labels"].write_bytes(idx_bytes(np.zeros(4)))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte holds 4 labels for the 3 images"):
        load_idx_folder(tmp_path)


def test_no_images_at_all(tmp_path):
    paths = write_folder(tmp_path)
    paths["t10k-images"].write_bytes(idx_bytes(np.zeros((0, 12, 12))))
    paths["t10k-labels"].write_bytes(idx_bytes(np.zeros(0)))
    with pytest.raises(DataError, match=r"holds no images \(its header says 0 x 12 x 12\)"):
        load_idx_folder(tmp_path)


def test_both_parts_must_have_one_size(tmp_path):
    write_folder(tmp_path)["t10k-images"].write_bytes(idx_bytes(images_of("t10k", side=16)))
    with pytest.raises(DataError, match=r"images of 16 x 16, .* of 12 x 12; both must have one size"):
        load_idx_folder(tmp_path)


def test_data_set_is_standardised_over_the_training_images(tmp_path):
    write_folder(tmp_path)
    data = load_folder(tmp_path)
    assert (data.train_images.shape, data.train_images.dtype) == ((6, 1, 12, 12), np.float32)
    assert (data.train_labels.dtype, data.side, data.classes) == (np.int64, 12, 4)
    raw = images_of("train")
    # float32 rounds a value of about 1 by 6e-8; 1e-6 leaves room for the three operations and their order.
    expected = (images_of("t10k") - raw.mean()) / raw.std()
    np.testing.assert_allclose(data.test_images[:, 0], expected, rtol=0, atol=1e-6)


def test_images_of_a_size_that_the_network_cannot_take(tmp_path):
    paths = write_folder(tmp_path)
    for part in PARTS:
        paths[f"{part}-images"].write_bytes(idx_bytes(images_of(part, side=14)))
    with pytest.raises(DataError, match=r"images of 14 x 14; .* multiple of 4 and at least 12"):
        load_folder(tmp_path)


def test_images_of_one_grey(tmp_path):
    write_folder(tmp_path)["train-images"].write_bytes(idx_bytes(np.full((6, 12, 12), 7)))
    with pytest.raises(DataError, match="every pixel of the training images is 7"):
        load_folder(tmp_path)
