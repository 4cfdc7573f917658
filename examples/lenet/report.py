"""What the training showed: a table, a line for every seed, and a plot."""

from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

WITHOUT, WITH = "#b35806", "#2166ac"  # told apart by colour-blind readers, and in grey


@dataclass(frozen=True)
class Run:
    """Both histories (lists of `lenet.training.Epoch`, of one length) for one seed."""

    seed: int
    without: list
    with_norm: list


def series(histories, field):
    """One field of several histories as an array, (histories, epochs)."""
    return np.array([[getattr(epoch, field) for epoch in history] for history in histories])


def epoch_table(runs):
    """A row an epoch, means over the seeds."""
    without, with_norm = [run.without for run in runs], [run.with_norm for run in runs]

    def pair(field, form):
        columns = series(without, field).mean(0), series(with_norm, field).mean(0)
        return [[form.format(v) for v in column] for column in columns]

    columns = [
        *pair("loss", "{:.4f}"),
        *pair("accuracy", "{:.1%}"),
        *pair("seconds", "{:.3f}"),
        [f"{v:.3f}" for v in series(with_norm, "normalisation").mean(0)],
    ]
    lines = [
        f"Mean of seeds {', '.join(str(run.seed) for run in runs)}",
        "         train loss          test accuracy       seconds per epoch   of which in",
        "epoch    without      with   without      with   without      with   BatchNorm",
    ]
    for epoch, row in enumerate(zip(*columns, strict=True), 1):
        lines.append(f"{epoch:5d}" + "".join(f"{cell:>{w}}" for cell, w in zip(row, (11, 10) * 3 + (12,), strict=True)))
    return "\n".join(lines)


def seed_table(runs):
    """A line a seed: who had the higher test accuracy, at the last epoch and at how many of all."""
    epochs = len(runs[0].without)
    lines = [
        f"         test accuracy, epoch {epochs:<3}   with is higher at    first epoch at 90 %",
        " seed    without      with                           without      with",
    ]
    for run in runs:
        a, b = series([run.without, run.with_norm], "accuracy")
        verdict = f"{np.sum(b > a)} of {epochs} epochs"
        lines.append(f"{run.seed:5d}{a[-1]:>11.1%}{b[-1]:>10.1%}{verdict:>21}{_reached(a):>13}{_reached(b):>10}")
    return "\n".join(lines)


def conclusion(runs):
    """Plain sentences: for how many seeds BatchNorm's test accuracy ended higher, and what it cost."""
    higher = sum(run.with_norm[-1].accuracy > run.without[-1].accuracy for run in runs)
    epochs = len(runs[0].without)
    plain = series([run.without for run in runs], "seconds").sum()
    seconds = series([run.with_norm for run in runs], "seconds").sum()
    normalisation = series([run.with_norm for run in runs], "normalisation").sum()
    return (
        f"At epoch {epochs} the net with BatchNorm has the higher test accuracy for {higher} of {len(runs)} "
        f"seed{'s' * (len(runs) != 1)}.\n"
        f"It trains for {seconds:.1f} s against {plain:.1f} s without; normalisation takes {normalisation:.1f} s of them, "
        f"{normalisation / seconds:.0%}."
    )


def plot(runs, path, title):
    """Training loss and test accuracy against the epoch, both nets, a line for every seed.

    No mean is drawn: the nets without BatchNorm start to learn at different epochs, and the mean of such curves looks
    like none of them.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)  # no display needed, whatever the user's backend is
    panels = zip(figure.subplots(1, 2), ("loss", "accuracy"), ("Training loss", "Test accuracy"), strict=True)
    for axes, field, name in panels:
        nets = ([run.without for run in runs], "without", WITHOUT), ([run.with_norm for run in runs], "with", WITH)
        for histories, word, colour in nets:
            values = series(histories, field)
            epochs = np.arange(1, values.shape[1] + 1)
            marker = "o" if len(epochs) == 1 else None  # a line of one point would not be seen
            lines = axes.plot(epochs, values.T, color=colour, linewidth=1.5, alpha=0.8, marker=marker)
            lines[0].set_label(f"{word} BatchNorm")
        axes.set(title=name, xlabel="epoch", ylabel="cross-entropy" if field == "loss" else "share of test images right")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if field == "accuracy":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def _reached(accuracy, target=0.9):
    """The first epoch at which the target is reached, "never" otherwise."""
    reached = np.flatnonzero(accuracy >= target)
    return str(reached[0] + 1) if len(reached) else "never"
