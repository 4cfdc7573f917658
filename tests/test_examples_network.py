"""The example's LeNet: its layers against naive forms and finite differences, its training, its command line."""

import doctest
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

# The examples are no installed package: `lenet` lies beside the script that uses it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from lenet import layers, report
from lenet.data import load_digits
from lenet.layers import AvgPool2d, Conv2d, Dense, Flatten, Sigmoid, col2im, im2col, softmax_cross_entropy
from lenet.network import lenet
from lenet.training import Epoch, epoch_batches, evaluate, first_call, train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

# Central differences in float64 with step h err by h**2 * f''' / 6, about 1e-10 at h = 1e-5, and by rounding of f,
# 2e-16 * |f| / h, about 1e-10 for the sums of some 100 terms here. 1e-7 is far above both and far below any gradient.
STEP, FINITE_DIFFERENCE = 1e-5, 1e-7


@pytest.fixture(autouse=True)
def one_blas_thread():
    """As the script does it: on busy cores BLAS' threads wait for each other, and a second becomes a minute."""
    with threadpool_limits(1, user_api="blas"):
        yield


def script():
    """examples/lenet_digits.py as a module."""
    spec = importlib.util.spec_from_file_location("lenet_digits", EXAMPLES / "lenet_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rng():
    return np.random.default_rng(5)


def numerical_gradient(f, a, picks=None):
    """Central differences of f() in the values of a that `picks` (flat indices) chooses, all by default."""
    picks = range(a.size) if picks is None else picks
    flat, gradient = a.reshape(-1), []
    assert np.shares_memory(flat, a), "a copy would be varied in place of the array"
    for i in picks:
        value = flat[i]
        flat[i] = value + STEP
        above = f()
        flat[i] = value - STEP
        below = f()
        flat[i] = value
        gradient.append((above - below) / (2 * STEP))
    return np.array(gradient)


LAYERS = {
    "conv": (lambda: Conv2d(np, rng(), 2, 3, kernel=3, dtype=np.float64), (2, 2, 6, 5)),
    "conv padded": (lambda: Conv2d(np, rng(), 2, 3, kernel=3, padding=1, dtype=np.float64), (2, 2, 4, 5)),
    "conv without bias": (lambda: Conv2d(np, rng(), 1, 2, kernel=5, padding=2, bias=False, dtype=np.float64), (2, 1, 5, 5)),
    "dense": (lambda: Dense(np, rng(), 6, 4, dtype=np.float64), (3, 6)),
    "dense without bias": (lambda: Dense(np, rng(), 6, 4, bias=False, dtype=np.float64), (3, 6)),
    "pool": (AvgPool2d, (2, 3, 4, 6)),
    "sigmoid": (lambda: Sigmoid(np), (2, 3, 4)),
    "flatten": (Flatten, (2, 3, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradients_are_those_of_finite_differences(name):
    make, shape = LAYERS[name]
    layer, x = make(), rng().normal(size=shape)
    for p in layer.parameters().values():
        p += 0.1 * rng().normal(size=p.shape)  # a bias of 0 would hide that it is used at all
    dy = rng().normal(size=layer(x).shape)

    def objective():
        return float((layer(x) * dy).sum())

    layer(x)
    dx = layer.backward(dy)
    assert list(layer.gradients()) == list(layer.parameters())
    assert ("bias" in layer.parameters()) == (name in ("conv", "conv padded", "dense"))
    gradients = {key: g.copy() for key, g in layer.gradients().items()}
    np.testing.assert_allclose(dx.ravel(), numerical_gradient(objective, x), rtol=0, atol=FINITE_DIFFERENCE)
    for key, p in layer.parameters().items():
        expected = numerical_gradient(objective, p)
        np.testing.assert_allclose(gradients[key].ravel(), expected, rtol=0, atol=FINITE_DIFFERENCE, err_msg=key)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_convolution_is_the_naive_one(padding):
    conv = Conv2d(np, rng(), 2, 3, kernel=3, padding=padding, dtype=np.float64)
    conv.bias[:] = 1, 2, 3
    x = rng().normal(size=(2, 2, 5, 6))
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    expected = np.empty((2, 3, 5 + 2 * padding - 2, 6 + 2 * padding - 2))
    for n, o, i, j in np.ndindex(expected.shape):
        patch = padded[n, :, i : i + 3, j : j + 3]
        expected[n, o, i, j] = (patch * conv.weight[o]).sum() + conv.bias[o]
    # Sums of 18 products of about 1 in another order: 18 roundings of 1.1e-16 each, times 10.
    np.testing.assert_allclose(conv(x), expected, rtol=0, atol=2e-14)


def test_im2col_puts_one_patch_in_every_column():
    x = rng().normal(size=(2, 3, 4, 5))
    columns = im2col(np, x, kernel=2, padding=0)
    assert columns.shape == (2, 3 * 2 * 2, 3 * 4)
    for n, i, j in np.ndindex(2, 3, 4):
        np.testing.assert_array_equal(columns[n, :, i * 4 + j], x[n, :, i : i + 2, j : j + 2].ravel())


@pytest.mark.parametrize("padding", [0, 2])
def test_col2im_is_the_transpose_of_im2col(padding):
    # Small whole numbers: both inner products are exact, so they must be equal.
    x = rng().integers(-9, 10, (2, 3, 5, 4)).astype(float)
    columns = im2col(np, x, 3, padding)
    other = rng().integers(-9, 10, columns.shape).astype(float)
    assert (columns * other).sum() == (x * col2im(np, other, x.shape, 3, padding)).sum()


def test_pooling_and_sigmoid_have_the_values_of_their_definitions():
    pooled = AvgPool2d()(np.arange(16.0).reshape(1, 1, 4, 4))
    np.testing.assert_array_equal(pooled, [[[[2.5, 4.5], [10.5, 12.5]]]])
    x = np.array([-3.0, 0.0, 0.5, 4.0])
    # tanh and exp differ by a rounding or two of 1.1e-16.
    np.testing.assert_allclose(Sigmoid(np)(x), 1 / (1 + np.exp(-x)), rtol=0, atol=1e-15)
    np.testing.assert_array_equal(Sigmoid(np)(np.float32([-1e30, 1e30])), [0, 1])  # and no overflow warning


def test_loss_of_equal_scores_is_log_classes_and_large_scores_do_not_overflow():
    loss, dscores = softmax_cross_entropy(np, np.zeros((2, 4)), np.array([0, 3]))
    assert loss == pytest.approx(np.log(4), abs=1e-15)  # one rounding of log
    np.testing.assert_array_equal(dscores, [[-0.375, 0.125, 0.125, 0.125], [0.125, 0.125, 0.125, -0.375]])
    loss, dscores = softmax_cross_entropy(np, np.float32([[1e30, 0]]), np.array([0]))
    assert loss == 0
    np.testing.assert_array_equal(dscores, [[0, 0]])


def test_loss_gradient_is_that_of_finite_differences():
    scores, labels = rng().normal(size=(3, 5)), np.array([4, 0, 2])
    _, dscores = softmax_cross_entropy(np, scores, labels)
    expected = numerical_gradient(lambda: float(softmax_cross_entropy(np, scores, labels)[0]), scores)
    np.testing.assert_allclose(dscores.ravel(), expected, rtol=0, atol=FINITE_DIFFERENCE)


@pytest.mark.parametrize("batch_norm", [False, True], ids=["without", "with"])
def test_whole_network_gradients_are_those_of_finite_differences(batch_norm):
    network = lenet(np, 12, 3, batch_norm=batch_norm, seed=1, dtype=np.float64)
    x, labels = rng().normal(size=(6, 1, 12, 12)), np.array([0, 1, 2, 0, 1, 2])

    def loss():
        return float(softmax_cross_entropy(np, network(x), labels)[0])

    dx = network.backward(softmax_cross_entropy(np, network(x), labels)[1])
    gradients = [{name: g.copy() for name, g in layer.gradients().items()} for layer in network.layers]
    picks = rng().choice(x.size, 5, replace=False)
    np.testing.assert_allclose(dx.ravel()[picks], numerical_gradient(loss, x, picks), rtol=0, atol=FINITE_DIFFERENCE)
    checked = 0
    for layer, kept in zip(network.layers, gradients, strict=True):
        for name, p in layer.parameters().items():
            # The largest gradient, where a wrong factor shows best, and two others.
            picks = [int(abs(kept[name]).argmax()), *rng().choice(p.size, 2, replace=False)]
            expected = numerical_gradient(loss, p, picks)
            what = f"{type(layer).__name__}.{name} {p.shape}"
            np.testing.assert_allclose(kept[name].ravel()[picks], expected, rtol=0, atol=FINITE_DIFFERENCE, err_msg=what)
            assert abs(expected[0]) > 100 * FINITE_DIFFERENCE, f"{what}: too small a gradient to show a wrong factor"
            checked += 1
    assert checked == (14 if batch_norm else 10)  # 5 weights and, without, 5 biases; with, 1 bias, 4 gammas, 4 betas


def test_both_networks_start_from_the_same_weights_and_seeds_differ():
    def weights(batch_norm, seed):
        network = lenet(np, 16, 10, batch_norm=batch_norm, seed=seed)
        return [layer.weight for layer in network.layers if isinstance(layer, layers.Affine)]

    without, with_norm, other = weights(False, 0), weights(True, 0), weights(False, 1)
    assert [w.shape for w in without] == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 64), (84, 120), (10, 84)]
    for a, b, c in zip(without, with_norm, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
        fan_in, fan_out = (n * int(np.prod(a.shape[2:])) for n in (a.shape[1], a.shape[0]))
        bound = np.sqrt(6 / (fan_in + fan_out))  # Glorot & Bengio 2010, equation 16
        # float32 rounds by 6e-8; of 150 or more uniform values one exceeds 0.9 of the bound with probability 1 - 1e-7
        assert 0.9 * bound < abs(a).max() <= bound * (1 + 1e-6)


def test_images_of_a_side_that_does_not_halve_twice_are_refused():
    with pytest.raises(ValueError, match=r"images of 14 x 14: .* multiples of 4 and at least 12"):
        lenet(np, 14, 10, batch_norm=False, seed=0)


def test_batches_use_every_image_once_and_drop_only_the_rest():
    batches = epoch_batches(rng(), 23, 5)
    assert batches.shape == (4, 5)
    assert len(set(batches.ravel())) == 20
    assert set(epoch_batches(rng(), 20, 5).ravel()) == set(range(20))


def test_digits_are_split_without_overlap():
    data = load_digits()
    assert (data.train_images.shape, data.test_images.shape) == ((1297, 1, 16, 16), (500, 1, 16, 16))
    assert (data.classes, data.train_images.dtype) == (10, np.float32)
    # float64 statistics of values rounded to float32: 6e-8 a value at most, less in the mean
    assert abs(data.train_images.mean(dtype=np.float64)) < 1e-7
    assert abs(data.train_images.std(dtype=np.float64) - 1) < 1e-7
    train_set = {image.tobytes() for image in data.train_images}
    assert not any(image.tobytes() in train_set for image in data.test_images)


@pytest.mark.parametrize("batch_norm", [False, True], ids=["without", "with"])
def test_an_epoch_is_deterministic_and_depends_on_the_seed(batch_norm):
    data = load_digits()

    def epoch(seed):
        keywords = {"epochs": 1, "lr": 2.0, "batch_size": 64, "progress": False}
        return train(np, data, batch_norm=batch_norm, seed=seed, **keywords)[0]

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert (first.loss, first.accuracy) == (again.loss, again.accuracy)
    assert first.loss != other.loss
    assert 0 <= first.normalisation < first.seconds
    assert (first.normalisation > 0) == batch_norm


def test_network_with_batch_norm_learns_the_digits_in_three_epochs():
    data = load_digits()
    history = train(np, data, batch_norm=True, seed=0, epochs=3, lr=2.0, batch_size=32, progress=False)
    assert history[-1].loss < history[0].loss / 3
    assert history[-1].accuracy > 0.8  # chance is 0.1; the mean of three seeds was 0.79 after one epoch and 0.92 after three


def test_accuracy_counts_over_several_batches_of_the_test(monkeypatch):
    monkeypatch.setattr("lenet.training.EVALUATION_BATCH", 2)
    scores = np.eye(5)  # of image k the largest score is that of class k
    assert evaluate(lambda images: images, scores, np.array([0, 1, 0, 3, 0])) == 3 / 5


def test_first_call_leaves_data_alone_and_takes_time():
    data = load_digits()
    before = data.train_images.copy()
    assert first_call(np, data, 8) > 0
    np.testing.assert_array_equal(data.train_images, before)


def run_of(seed, without, with_norm):
    """A Run whose accuracies are given; the rest is fixed."""
    return report.Run(seed, [Epoch(1.0, a, 2.0, 0.0) for a in without], [Epoch(0.5, a, 3.0, 0.75) for a in with_norm])


def test_report_says_so_when_batch_norm_does_not_win():
    runs = [run_of(3, [0.1, 0.95], [0.9, 0.95]), run_of(4, [0.1, 0.2], [0.5, 0.6])]
    text = report.conclusion(runs)
    assert "for 1 of 2 seeds" in text  # equal is not higher
    assert "trains for 12.0 s against 8.0 s without; normalisation takes 3.0 s of them, 25%" in text
    rows = report.seed_table(runs).splitlines()[2:]
    assert rows[0].split() == ["3", "95.0%", "95.0%", "1", "of", "2", "epochs", "2", "1"]
    assert rows[1].split() == ["4", "20.0%", "60.0%", "2", "of", "2", "epochs", "never", "never"]
    table = report.epoch_table(runs).splitlines()
    assert table[0] == "Mean of seeds 3, 4"
    assert table[-1].split() == ["2", "1.0000", "0.5000", "57.5%", "77.5%", "2.000", "3.000", "0.750"]


def test_documented_example_of_im2col_holds():
    result = doctest.testmod(layers)
    assert result.attempted > 0
    assert result.failed == 0


def small_data(folder, images=40):
    """A folder of IDX files with few images of 12 x 12 in three classes."""
    for part in ("train", "t10k"):
        pixels = rng().integers(0, 256, (images, 12, 12)).astype(np.uint8)
        for kind, values in (("images", pixels), ("labels", (np.arange(images) % 3).astype(np.uint8))):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            (folder / f"{part}-{kind}-idx{values.ndim}-ubyte").write_bytes(header + values.tobytes())
    return folder


def test_script_prints_the_tables_and_writes_the_picture(tmp_path, capsys):
    out = tmp_path / "new folder" / "curves.png"
    options = ["--data", str(small_data(tmp_path)), "--epochs", "1", "--seeds", "0", "7", "--batch-size", "8"]
    script().main([*options, "--out", str(out)])
    assert out.read_bytes().startswith(PNG_MAGIC)
    printed = capsys.readouterr()
    assert "40 training and 40 test images of 12 x 12; lr 2, batch size 8, 1 epochs" in printed.out
    assert "Mean of seeds 0, 7" in printed.out
    assert "of 2 seeds." in printed.out
    for words in ("seed 0, without BatchNorm, epoch 1/1", "seed 7, with BatchNorm, epoch 1/1"):  # the progress bars
        assert words in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "nowhere is no folder"),
        (["--out", "curves.jpg"], "give a name that ends in .png"),
        (["--batch-size", "5000"], "--batch-size is 5000; there are 1297 training images"),
        (["--batch-size", "1"], "'1' is no whole number >= 2"),
        (["--epochs", "0"], "'0' is no whole number >= 1"),
        (["--seeds", "-1"], "no whole number >= 0"),
        (["--lr", "nan"], "'nan' is no finite number > 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_script_ends_with_code_2_and_a_message(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        script().main(options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_script_without_cupy_names_the_ways_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)  # makes `import cupy` fail, also where it is installed
    with pytest.raises(SystemExit) as caught:
        script().main(["--device", "cuda"])
    assert caught.value.code == 2
    assert "needs CuPy" in (error := capsys.readouterr().err)
    assert "use --device cpu" in error


def test_script_names_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as caught:
            script().main(["--out", str(out)])
        assert caught.value.code == 2
        assert str(out) in capsys.readouterr().err


def test_script_runs_from_any_folder_and_shows_no_traceback(tmp_path):
    (small_data(tmp_path) / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    command = [sys.executable, str(EXAMPLES / "lenet_digits.py"), "--data", "."]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("lenet_digits.py: error: train-images-idx3-ubyte ends within its header")
    assert "Traceback" not in result.stderr
