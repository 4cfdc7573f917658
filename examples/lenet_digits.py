"""Train a small LeNet on handwritten digits, once with and once without `fastbn.BatchNorm`.

    pip install -e ".[demo]"
    python examples/lenet_digits.py

Both nets start from the same weights, see the same images in the same order and take the same steps; it is done for
three seeds. Ends in a table, a line for every seed, and examples/out/lenet_digits.png. With MNIST or Fashion-MNIST
(four IDX files in a folder): python examples/lenet_digits.py --data FOLDER
"""

import argparse
import math
import os
import sys
from pathlib import Path

try:
    from lenet import report
    from lenet.data import load_digits, load_folder
    from lenet.device import DeviceError, array_module
    from lenet.idx import DataError
    from lenet.training import first_call, train
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    import fastbn
except ModuleNotFoundError as error:
    print(f"{error}; install what the example needs: pip install -e '.[demo]'", file=sys.stderr)
    sys.exit(2)

EPOCHS, EPOCHS_WITH_DATA = 40, 5  # MNIST has 46 times the steps an epoch
PICTURE = Path(__file__).resolve().parent / "out" / "lenet_digits.png"


def main(arguments=None):
    """Run the command line; returns nothing. Ends with exit code 2 and one line for what the user can put right."""
    parser = argument_parser()
    options = parser.parse_args(arguments)
    try:
        xp = array_module(options.device)
        data = load_digits() if options.data is None else load_folder(options.data)
        prepare_picture(options.out)
    except (DataError, DeviceError, PictureError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    n = len(data.train_labels)
    if options.batch_size > n:
        parser.exit(2, f"{parser.prog}: error: --batch-size is {options.batch_size}; there are {n} training images\n")
    epochs = options.epochs or (EPOCHS if options.data is None else EPOCHS_WITH_DATA)

    # One BLAS thread: the matrices are small, a second thread gains nothing, and where other work has the cores BLAS'
    # threads wait for each other (seen on 2 busy cores: 60 epochs in 3 s alone, 68 s beside other programs).
    with threadpool_limits(1, user_api="blas"):
        data = data.on(xp)
        print(
            f"{data.name}: {n} training and {len(data.test_labels)} test images of {data.side} x {data.side}; "
            f"lr {options.lr:g}, batch size {options.batch_size}, {epochs} epochs; fastbn {fastbn.__version__}, "
            f"{xp.__name__} {xp.__version__}"
        )
        print(f"First call of fastbn, with what Numba has to compile: {first_call(xp, data, options.batch_size):.1f} s")
        keywords = {"epochs": epochs, "lr": options.lr, "batch_size": options.batch_size}
        runs = []
        for seed in options.seeds:
            nets = (train(xp, data, batch_norm=batch_norm, seed=seed, **keywords) for batch_norm in (False, True))
            runs.append(report.Run(seed, *nets))

    print(f"\n{report.epoch_table(runs)}\n\n{report.seed_table(runs)}\n\n{report.conclusion(runs)}")
    title = (
        f"LeNet on {data.name}, with and without fastbn.BatchNorm\n"
        f"same initial weights, order of images and learning rate ({options.lr:g}); "
        f"one line for every seed ({', '.join(map(str, options.seeds))})"
    )
    report.plot(runs, options.out, title)
    print(f"Plot: {options.out}")


def argument_parser():
    parser = argparse.ArgumentParser(
        description="Train a small LeNet with and without fastbn.BatchNorm; print a table, draw the curves.",
    )
    add = parser.add_argument
    add("--epochs", type=whole(1), help=f"default: {EPOCHS}; {EPOCHS_WITH_DATA} with --data")
    add("--lr", type=learning_rate, default=2.0, help="learning rate of SGD, the same for both nets (default: 2)")
    add("--batch-size", type=whole(2), default=32, help="images a step, at least 2 (default: 32)")
    add("--seeds", type=whole(0), nargs="+", default=[0, 1, 2], metavar="SEED", help="a pair of nets for each (default: 0 1 2)")
    add("--data", type=Path, metavar="DIR", help="folder with the four IDX files of MNIST or Fashion-MNIST, plain or .gz")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="NumPy (the default) or CuPy")
    add("--out", type=Path, default=PICTURE, metavar="PNG", help="the plot (default: examples/out/lenet_digits.png)")
    return parser


def whole(least):
    """An argparse type: a whole number, at least `least`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= {least}")
        return value

    return parse


def learning_rate(text):
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number > 0")
    return value


class PictureError(Exception):
    """The plot could not be written where it should go; the message says what to do."""


def prepare_picture(path):
    """Make the plot's folder; raise now what would otherwise be raised after the training."""
    if path.suffix.lower() != ".png":
        raise PictureError(f"--out is {path}; the plot is a PNG: give a name that ends in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PictureError(f"--out {path}: its folder cannot be made ({error.strerror}); choose another place") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PictureError(f"--out {path} cannot be written (a folder, or no permission); choose another file")


if __name__ == "__main__":
    sys.exit(main())
