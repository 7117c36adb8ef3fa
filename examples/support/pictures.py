"""The pictures of the examples, in colours that colour-blind readers can tell apart."""

from typing import Any

import jax
import numpy as np
import sklearn.decomposition
from matplotlib.animation import PillowWriter
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

import jaxgrl

from .run import CHUNK, Run, std

LOOKS = {
    "source only": ("#D55E00", "--"),
    "DANN": ("#0072B2", "-"),
    "CDAN": ("#117733", "-."),
    "trained on target": ("0.35", ":"),
}
DIGIT_COLORS = (  # Tol's muted scheme
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777"),
)
CLASS_COLORS = ("#0072B2", "#D55E00")
CURVE_COLORS = {"source only": "0.4", "DANN": "#882255", "scale": "#117733"}
SIDE = 1.9  # half the side of the square of the moons: it holds them at any angle


def steps_of(run: Run) -> Any:
    """Returns the steps at which a run was evaluated."""
    return np.arange(CHUNK, run.results["arguments"]["steps"] + 1, CHUNK)


def scale_of(run: Run) -> Any:
    """Returns the scale of DANN at those steps."""
    arguments = run.results["arguments"]
    schedule = jaxgrl.dann_schedule(arguments["steps"], end_value=arguments["scale"])
    return np.asarray(schedule(steps_of(run)))


def draw_curve(
    axis: Any, run: Run, method: str, number: str, factor: float, look: Any = None
) -> None:
    """Draws a number of a method over the steps: mean and deviation over the seeds."""
    color, style = look or LOOKS[method]
    values = factor * np.array(run.results["methods"][method][number])
    mean, band, steps = values.mean(axis=1), std(values), steps_of(run)
    axis.plot(steps, mean, style, color=color, label=method, lw=2)
    axis.fill_between(steps, mean - band, mean + band, color=color, alpha=0.2, lw=0)
    axis.grid(visible=True, alpha=0.3)
    axis.set_xlabel("training step")


def draw_digits(run: Run, features: Any, labels: Any) -> None:
    """Draws the accuracies over the steps, and the features of both domains."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    (left, right), maps = figure.subplots(2, 2)
    methods = list(run.results["methods"])
    for method in methods:
        draw_curve(left, run, method, "target_accuracy", 100)
    for method in methods[:2]:
        draw_curve(right, run, method, "domain_accuracy", 1)
    steps = steps_of(run)
    right.plot(steps, scale_of(run), "-.", color="#009E73", label="scale of DANN")
    right.axhline(0.5, color="black", lw=0.8)
    right.annotate("0.5: domains confused", (steps[-1], 0.48), ha="right", va="top")
    left.set(title="(a) Target accuracy, mean ± std over seeds", ylim=(0, 100))
    left.set_ylabel("target accuracy [%]")
    right.set(title="(b) Domain accuracy and scale", ylim=(0, None))
    right.set_ylabel("domain accuracy, scale")
    for axis in (left, right):
        axis.legend(loc="lower right")
    titles = ("(c) Features, source only", "(d) Features, DANN")
    for axis, method, title in zip(maps, methods, titles, strict=False):
        axis.set_title(title)
        draw_features(axis, features[method], labels)
    figure.savefig(run.folder / "dann_digits.png", dpi=100)


def draw_features(axis: Any, features: Any, labels: Any) -> None:
    """Draws source and target features on the two principal components of both."""
    pca = sklearn.decomposition.PCA(2).fit(np.concatenate(features))
    source, target = (pca.transform(values) for values in features)
    full = {"marker": "o", "ls": "", "alpha": 0.6}
    hollow = {"marker": "^", "ls": "", "fillstyle": "none"}
    for digit, color in enumerate(DIGIT_COLORS):
        own = source[labels[0] == digit]
        axis.plot(*own[:30].T, ms=5, color=color, **full)
        axis.plot(*target[labels[1] == digit][:30].T, ms=5, color=color, **hollow)
        box = {"boxstyle": "circle,pad=0.15", "fc": "white", "ec": color}
        axis.text(*np.median(own, axis=0), f"{digit}", bbox=box, zorder=3)
    axis.plot([], [], color="0.3", label="source", **full)
    axis.plot([], [], color="0.3", label="target", **hollow)
    axis.set(xlabel="principal component 1", ylabel="principal component 2")
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 2}
    axis.legend(title="a number marks the source median of its class", **place)


def draw_points(axis: Any, split: Any) -> None:
    """Draws source points, filled, and test points, hollow, coloured by their class."""
    looks = {
        "source": {"marker": "o", "ms": 5, "mec": "white", "mew": 0.5},
        "test": {"marker": "^", "ms": 6, "mfc": "none", "mew": 1.2},
    }
    for name, look in looks.items():
        for label, color in enumerate(CLASS_COLORS):
            own = split[name][split[f"{name}_labels"] == label][:60]
            text = f"{name.replace('test', 'target')}, class {label}"
            axis.plot(*own.T, ls="", color=color, label=text, **look)
    limits = (-SIDE, SIDE)
    axis.set(xlim=limits, ylim=limits, aspect="equal", xticks=[], yticks=[])


def draw_regions(axis: Any, model: Any) -> list[Any]:
    """Draws the probability of class 1 and the boundary; returns what it drew."""
    side = np.linspace(-SIDE, SIDE, 150, dtype=np.float32)
    grid = np.stack(np.meshgrid(side, side), axis=-1)
    probability = np.asarray(jax.nn.softmax(model(grid).label_logits)[..., 1])
    tints = LinearSegmentedColormap.from_list("", ["#A9D0EA", "white", "#F7CBA8"])
    levels = np.linspace(0, 1, 11)
    drawn = [axis.contourf(side, side, probability, levels, cmap=tints, zorder=0)]
    # Matplotlib warns of a contour that is nowhere: all points may be of one class.
    if probability.min() < 0.5 < probability.max():
        drawn += [
            axis.contour(side, side, probability, [0.5], colors="black", zorder=1)
        ]
    return drawn


def draw_chance(axis: Any, steps: Any) -> None:
    """Draws the line at which the discriminator guesses, over an axis of steps."""
    axis.axhline(0.5, color="black", lw=0.8)
    axis.annotate(
        "0.5: domains confused", (0.98 * steps[-1], 0.49), ha="right", va="top"
    )
    axis.set(xlabel="training step", xlim=(0, steps[-1]))
    axis.grid(visible=True, alpha=0.3)


def draw_moons(run: Run, models: Any, split: Any) -> None:
    """Draws the boundary of one seed without and with DANN, and the domain accuracy."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    *maps, right = figure.subplots(1, 3)
    seed = run.results["drawn_seed"]
    for method, axis in zip(run.results["methods"], maps, strict=False):
        curves = run.results["methods"][method]
        accuracy = 100 * curves["target_accuracy"][-1][seed]
        axis.set_title(f"{method}: {accuracy:.1f} % of the target right")
        draw_regions(axis, models[method][-1])
        draw_points(axis, split)
        look = CURVE_COLORS[method], LOOKS[method][1]
        draw_curve(right, run, method, "domain_accuracy", 1, look)
    draw_chance(right, steps_of(run))
    right.set(title="Domain accuracy, mean ± std over seeds", ylim=(0.4, 1))
    right.legend(loc="upper right")
    handles = maps[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower left", ncols=4)
    figure.suptitle(
        f"Seed {seed}, the median of {run.results['arguments']['seeds']} by the "
        "accuracy of DANN. The triangles' colours are for the reader: DANN never sees "
        "target labels."
    )
    figure.savefig(run.folder / "dann_moons.png", dpi=110)


def animate_moons(run: Run, models: Any, split: Any) -> None:
    """Films the boundary of the same seed during the training of DANN."""
    figure = Figure(figsize=(8.4, 4.6))
    left = figure.add_axes((0.02, 0.16, 0.43, 0.76))
    right = figure.add_axes((0.52, 0.16, 0.44, 0.76))
    seed, steps = run.results["drawn_seed"], steps_of(run)
    curves = run.results["methods"]["DANN"]
    accuracy = 100 * np.array(curves["target_accuracy"])[:, seed]
    grown = {
        "domain accuracy": ("-", "DANN", np.array(curves["domain_accuracy"])[:, seed]),
        "scale of the reversal": ("-.", "scale", scale_of(run)),
    }
    lines = []
    for label, (style, color, values) in grown.items():
        color = CURVE_COLORS[color]
        lines += right.plot(steps, values, style, color=color, label=label, lw=2)
    draw_chance(right, steps)
    right.set(ylim=(0, None))
    right.legend(loc="lower right")
    draw_points(left, split)
    handles = left.get_legend_handles_labels()
    place = {"loc": "lower left", "ncols": 4, "columnspacing": 1, "frameon": False}
    figure.legend(*handles, fontsize=9, **place)
    # At most 24 frames, the last among them; that one then stays for a while.
    frames = range(len(steps))[:: -(1 + (len(steps) - 1) // 24)][::-1]
    writer = PillowWriter(fps=5)
    with writer.saving(figure, run.folder / "dann_moons.gif", dpi=70):
        for i in [*frames, *[frames[-1]] * 8]:
            contours = draw_regions(left, models[i])
            for line, (_, _, values) in zip(lines, grown.values(), strict=True):
                line.set_data(steps[: i + 1], values[: i + 1])
            title = f"DANN, step {steps[i]}: {accuracy[i]:.0f} % of the target right"
            left.set_title(title)
            writer.grab_frame()
            for contour in contours:
                contour.remove()


def two_of_each(images: Any, labels: Any) -> Any:
    """Returns one picture of two images of each digit."""
    images = images[..., 0] - images.min(axis=(1, 2, 3))[:, None, None]
    tiles = np.pad(images / images.max(axis=(1, 2), keepdims=True), ((0,), (1,), (1,)))
    digits = [np.resize(tiles[labels == digit], (2, 18, 18)) for digit in range(10)]
    return np.concatenate(digits, axis=2).reshape(36, 180)


def draw_confusion(axis: Any, confusion: Any) -> None:
    """Draws which digit is taken for which, in percent of the true one."""
    counts = np.sum(confusion, axis=0)
    share = 100 * counts / counts.sum(axis=1, keepdims=True)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(share):
        if value >= 0.5:
            color = "white" if value > 60 else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", c=color)
    axis.set(xticks=range(10), yticks=range(10), xlabel="predicted digit")
    axis.set_ylabel("true digit, each row in percent")


def draw_usps_mnist(run: Run, sets: Any, names: Any) -> None:
    """Draws both domains, the accuracy over the training, and the mistakes left."""
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    axes = figure.subplot_mosaic("AAABBB;CCDDEE", height_ratios=(0.8, 1))
    pairs = [two_of_each(*sets[name]) for name in names]
    axes["A"].imshow(np.vstack(pairs), cmap="gray")
    axes["A"].set_yticks([17.5, 53.5], [f"source:\n{names[0]}", f"target:\n{names[1]}"])
    axes["A"].set(title="(a) Two images of each digit", xticks=[])
    axes["A"].axhline(35.5, color="white", lw=2)
    right = axes["B"]
    for method, letter in zip(run.results["methods"], "CDE", strict=True):
        curves = run.results["methods"][method]
        draw_curve(right, run, method, "target_accuracy", 100)
        draw_confusion(axes[letter], curves["confusion"][-1])
        mean = 100 * np.mean(curves["target_accuracy"][-1])
        axes[letter].set_title(f"({letter.lower()}) {method}: {mean:.1f} % right")
    right.set(title="(b) Target accuracy, mean ± std over seeds", ylim=(None, 100))
    right.set(ylabel="target accuracy [%]", xlim=(0, None))
    right.legend(loc="upper left")
    figure.suptitle(f"{run.results['task']}: {run.results['protocol']}")
    figure.savefig(run.folder / "dann_usps_mnist.png", dpi=100)


def draw_choice(run: Run, scales: Any, grid: Any, chosen: int) -> None:
    """Draws InfoMax over the scale, with the true target accuracy below it."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    x = np.arange(len(scales))
    panels = {
        above: (grid["InfoMax"], "#0072B2", "InfoMax [nats]"),
        below: (100 * grid["target accuracy"], "#D55E00", "target accuracy [%]"),
    }
    for axis, (values, color, name) in panels.items():
        each = np.repeat(x, values.shape[1]), values.ravel()
        axis.plot(*each, "o", color=color, alpha=0.35, ms=4, mew=0, label="a run")
        axis.plot(x, values.mean(axis=1), "-", color=color, lw=2, label="mean")
        at = values.mean(axis=1)[chosen]
        axis.plot(chosen, at, "*", color=color, ms=18, mec="white", label="chosen")
        axis.set_ylabel(name)
        axis.legend(loc="best", fontsize=8)
        axis.grid(visible=True, alpha=0.3)
    angle = run.results["arguments"]["angle"]
    above.set_title(f"(a) The criterion, digits rotated by {angle:g} degrees")
    below.set_title("(b) The true accuracy, which the choice does not use")
    below.set_xticks(x, [f"{scale:g}" for scale in scales])
    below.set_xlabel("scale")
    figure.savefig(run.folder / "choose_scale.png", dpi=110)


def draw_fairness(run: Run, measures: Any, scales: Any, values: Any) -> None:
    """Draws the measures [scale, seed, measure] over the scale."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    places = np.arange(len(scales))
    for i, (axis, name) in enumerate(zip(figure.subplots(1, 3), measures, strict=True)):
        mean, bar = values[..., i].mean(axis=1), std(values[..., i])
        axis.errorbar(places, mean, bar, fmt="o-", color="#0072B2", capsize=3)
        axis.set(title=name, xlabel="scale", ylabel=measures[name])
        axis.set_xticks(places, [f"{scale:g}" for scale in scales])
        axis.set_ylim(0, None)
        axis.grid(visible=True, alpha=0.3)
    figure.suptitle("Held-out patients, mean ± standard deviation over splits")
    figure.savefig(run.folder / "fair_diabetes.png", dpi=110)
