"""Domain-adversarial training (DANN) on two moons, seen as a moving decision boundary.

The source domain is scikit-learn's two moons with their labels, the target domain is
other moons, turned and without labels. A classifier trained on the source alone follows
the source's moons and cuts through the target's. DANN makes the features of both
domains alike, and so bends the boundary until it parts the target's moons too.

    python examples/dann_moons.py            # 3 methods x 10 seeds, a PNG and a GIF
    python examples/dann_moons.py --help

Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 17, 2016, section 5.1
https://jmlr.org/papers/v17/15-239.html
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from flax import nnx
from matplotlib.animation import PillowWriter
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxgrl
from jaxgrl.nnx import DANN

POINTS = 300  # in each domain; three times as many score
BATCH = 64  # examples from each domain
CHUNK = 100  # steps in one compiled call, between two evaluations or two frames
SIDE = 1.9  # half the side of the drawn square: it holds the moons at any angle
METHODS = ("source only", "DANN", "trained on target")
CLASS_COLORS = ("#0072B2", "#D55E00")  # these and the next: safe for the colour-blind
CURVE_COLORS = {"source only": "0.4", "DANN": "#882255", "scale": "#117733"}


# 1. The model: jaxgrl.nnx.DANN puts the reversal between features and discriminator.
#    With a single layer of features the domain accuracy stayed near 0.75.
def make_model(rngs):
    """Returns a DANN for points in the plane: 2 label logits and 1 domain logit."""
    linear = functools.partial(nnx.Linear, rngs=rngs)
    return DANN(
        feature_extractor=nnx.Sequential(
            linear(2, 15), nnx.relu, linear(15, 15), nnx.relu
        ),
        label_classifier=linear(15, 2),
        domain_discriminator=nnx.Sequential(
            linear(15, 15), nnx.relu, linear(15, 15), nnx.relu, linear(15, 1)
        ),
    )


# 2. The data. Every seed draws its own; the target's labels train the ceiling and
#    nothing else, and the test points are fresh ones of the target.
def make_data(angle, seed):
    """Returns source moons, and target and test moons turned by the angle."""
    turn = np.radians(angle)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    random = np.random.RandomState(seed)
    data = {}
    for name, count in {"source": POINTS, "target": POINTS, "test": 3 * POINTS}.items():
        x, labels = sklearn.datasets.make_moons(count, noise=0.1, random_state=random)
        x = x - np.array([0.5, 0.25])  # turned about the middle of the two moons
        data[name] = (x if name == "source" else x @ matrix).astype(np.float32)
        data[f"{name}_labels"] = labels
    return data


# 3. The training: a chunk of steps is one lax.scan, and vmap runs all seeds at once.
#    The scale is data, so the three methods share a single compilation.
def make_train_chunk(graphdef, optimizer, steps):
    """Returns a function that trains every seed for CHUNK steps and evaluates it."""
    domains = jnp.repeat(jnp.array([0, 1]), BATCH)  # source 0, target 1

    def train_chunk(state, data, key, scale, start):
        # From 0 to scale over the training: at first the discriminator knows nothing.
        schedule = jaxgrl.dann_schedule(steps, end_value=scale)

        def train_step(state, step):
            params, opt_state = state
            source_key, target_key = jax.random.split(jax.random.fold_in(key, step))
            s = jax.random.randint(source_key, (BATCH,), 0, POINTS)
            t = jax.random.randint(target_key, (BATCH,), 0, POINTS)
            x = jnp.concatenate([data["source"][s], data["target"][t]])

            def loss_fn(params):
                model = nnx.merge(graphdef, params)
                label_logits, domain_logits = model(x, schedule(step))
                label_loss = optax.losses.softmax_cross_entropy_with_integer_labels(
                    label_logits[:BATCH], data["source_labels"][s]
                ).mean()
                # Added, without a weight: sign and strength are the layer's business.
                loss = label_loss + jaxgrl.domain_loss(domain_logits, domains)
                return loss, jaxgrl.domain_accuracy(domain_logits, domains)

            grads, accuracy = jax.grad(loss_fn, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), accuracy

        state, accuracies = jax.lax.scan(train_step, state, start + jnp.arange(CHUNK))
        label_logits, _ = nnx.merge(graphdef, state[0])(data["test"])
        hits = jnp.argmax(label_logits, axis=-1) == data["test_labels"]
        metrics = {"domain_accuracy": accuracies, "target_accuracy": hits}
        return state, jax.tree.map(jnp.mean, metrics)

    return jax.jit(jax.vmap(train_chunk, in_axes=(0, 0, 0, None, None)))


def train(args, splits, seconds):
    """Yields (method, step, metrics, model with a seed axis) after every chunk."""
    graphdef = nnx.graphdef(make_model(nnx.Rngs(0)))
    data = jax.tree.map(lambda *arrays: jnp.stack(arrays), *splits)
    # The ceiling is the same training with the target's points and labels as source.
    ceiling = data | {"source": data["target"], "source_labels": data["target_labels"]}
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))
    learning_rate = jaxgrl.dann_learning_rate(
        args.learning_rate, transition_steps=args.steps
    )
    optimizer = optax.adam(learning_rate)

    @jax.vmap
    def init(key):
        params = nnx.state(make_model(nnx.Rngs(key)))
        return params, optimizer.init(params)

    initial = init(keys)
    start = time.perf_counter()
    train_chunk = make_train_chunk(graphdef, optimizer, args.steps)
    train_chunk = train_chunk.lower(initial, data, keys, 0.0, 0).compile()
    seconds["compile"] = time.perf_counter() - start

    for method in METHODS:
        state, start = initial, time.perf_counter()
        scale = args.scale if method == "DANN" else 0.0
        used = ceiling if method == "trained on target" else data
        for step in range(0, args.steps, CHUNK):
            state, metrics = train_chunk(state, used, keys, scale, step)
            metrics = jax.tree.map(np.asarray, metrics)
            seconds[method] = time.perf_counter() - start
            yield method, step + CHUNK, metrics, nnx.merge(graphdef, state[0])


# 4. What is left to look at: a table, a picture, a film and a file.
def print_table(results):
    """Prints a row for each method: target accuracy, and its gain over source only."""
    print(f"{'target accuracy [%]':>35}{'gain over source only':>25}{'worst seed':>14}")
    baseline = 100 * np.array(results["methods"][METHODS[0]]["target_accuracy"][-1])
    for method, curves in results["methods"].items():
        accuracy = 100 * np.array(curves["target_accuracy"][-1])
        gain = accuracy - baseline
        cells = (f"{v.mean():.1f} ± {std(v):.1f}" for v in (accuracy, gain))
        row = "{:18}{:>17}{:>25}".format(method, *cells) + f"{gain.min():+14.1f}"
        print(row if method != METHODS[0] else row[:35])
    print("mean ± standard deviation over seeds; the gain is paired, seed by seed")


def std(values):
    """Returns the sample standard deviation over the last axis; of one value, 0."""
    return np.std(values, axis=-1, ddof=values.shape[-1] > 1)


def median_seed(results):
    """Returns the seed whose DANN accuracy is the median (of two, the lower)."""
    accuracy = np.array(results["methods"]["DANN"]["target_accuracy"][-1])
    return int(np.argsort(accuracy, kind="stable")[(len(accuracy) - 1) // 2])


def draw_points(axis, split):
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


def draw_regions(axis, model):
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


def draw_chance(axis, steps):
    """Draws the line at which the discriminator guesses, over an axis of steps."""
    axis.axhline(0.5, color="black", lw=0.8)
    axis.annotate(
        "0.5: domains confused", (0.98 * steps[-1], 0.49), ha="right", va="top"
    )
    axis.set(xlabel="training step", xlim=(0, steps[-1]))
    axis.grid(alpha=0.3)


def plot(results, models, split, path):
    """Draws the boundary of one seed without and with DANN, and the domain accuracy."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    *maps, right = figure.subplots(1, 3)
    seed, arguments = results["drawn_seed"], results["arguments"]
    steps = np.arange(CHUNK, arguments["steps"] + 1, CHUNK)
    for method, axis, style in zip(METHODS, maps, ("--", "-"), strict=False):
        curves, color = results["methods"][method], CURVE_COLORS[method]
        accuracy = 100 * curves["target_accuracy"][-1][seed]
        axis.set_title(f"{method}: {accuracy:.1f} % of the target right")
        draw_regions(axis, models[method][-1])
        draw_points(axis, split)
        values = np.array(curves["domain_accuracy"])
        mean, band = values.mean(axis=1), std(values)
        right.plot(steps, mean, style, color=color, label=method, lw=2)
        right.fill_between(
            steps, mean - band, mean + band, color=color, alpha=0.2, lw=0
        )
    draw_chance(right, steps)
    right.set(title="Domain accuracy, mean ± std over seeds", ylim=(0.4, 1))
    right.legend(loc="upper right")
    handles = maps[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower left", ncols=4)
    figure.suptitle(
        f"Seed {seed}, the median of {arguments['seeds']} by the accuracy of DANN. "
        "The triangles' colours are for the reader: DANN never sees target labels."
    )
    figure.savefig(path, dpi=110)


def animate(results, models, split, path):
    """Films the boundary of the same seed during the training of DANN."""
    figure = Figure(figsize=(8.4, 4.6))
    left = figure.add_axes((0.02, 0.16, 0.43, 0.76))
    right = figure.add_axes((0.52, 0.16, 0.44, 0.76))
    seed, arguments = results["drawn_seed"], results["arguments"]
    steps = np.arange(CHUNK, arguments["steps"] + 1, CHUNK)
    schedule = jaxgrl.dann_schedule(arguments["steps"], end_value=arguments["scale"])
    curves = results["methods"]["DANN"]
    accuracy = 100 * np.array(curves["target_accuracy"])[:, seed]
    grown = {
        "domain accuracy": ("-", "DANN", np.array(curves["domain_accuracy"])[:, seed]),
        "scale of the reversal": ("-.", "scale", np.asarray(schedule(steps))),
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
    figure.legend(
        *handles, loc="lower left", ncols=4, columnspacing=1, frameon=False, fontsize=9
    )
    # At most 45 frames, the last among them; that one then stands still for a while.
    frames = range(len(steps))[:: -(1 + (len(steps) - 1) // 45)][::-1]
    writer = PillowWriter(fps=7)
    with writer.saving(figure, path, dpi=80):
        for i in [*frames, *[frames[-1]] * 10]:
            contours = draw_regions(left, models["DANN"][i])
            for line, (_, _, values) in zip(lines, grown.values(), strict=True):
                line.set_data(steps[: i + 1], values[: i + 1])
            title = f"DANN, step {steps[i]}: {accuracy[i]:.0f} % of the target right"
            left.set_title(title)
            writer.grab_frame()
            for contour in contours:
                contour.remove()


def write_json(results, path):
    """Writes the file in one move: an interruption leaves the old one or the new."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(results, indent=1))
    draft.replace(path)


def parse_args():
    """Returns the options, checked."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--angle", type=float, default=35.0, help="turn of the target in degrees")
    add("--seeds", type=int, default=10, help="number of runs of each method")
    add("--steps", type=int, default=4000, help=f"of each run, a multiple of {CHUNK}")
    add("--scale", type=float, default=1.0, help="what the reversal strength rises to")
    add("--learning-rate", type=float, default=0.01, help="at the start of a run")
    add("--output", type=pathlib.Path, default="runs", help="where results are kept")
    add("--no-plot", action="store_true", help="leave out the picture and the film")
    args = parser.parse_args()

    def check(option, value, holds, rule):
        if not holds:
            parser.error(f"--{option} must be {rule}, got {value}")

    check("angle", args.angle, -180 <= args.angle <= 180, "between -180 and 180")
    check("seeds", args.seeds, 1 <= args.seeds <= 100, "between 1 and 100")
    whole = args.steps > 0 and args.steps % CHUNK == 0
    check("steps", args.steps, whole, f"a positive multiple of {CHUNK}")
    check("scale", args.scale, 0 <= args.scale < np.inf, "finite and 0 or more")
    rate = args.learning_rate
    check("learning-rate", rate, 0 < rate < np.inf, "finite and positive")
    return args


def main():
    """Trains, keeps what is finished, and shows it."""
    args = parse_args()
    folder = args.output / f"dann_moons-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True)
    packages = ("jaxgrl", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
    versions = {name: importlib.metadata.version(name) for name in packages}
    results = {
        "complete": False,
        "command": shlex.join(sys.argv),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "arguments": {k: str(v) if k == "output" else v for k, v in vars(args).items()},
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "seconds": {},
        "layout": f"methods[method][number][evaluation, every {CHUNK} steps][seed]",
        "methods": {},
    }
    write_json(results, folder / "results.json")
    splits = [make_data(args.angle, seed) for seed in range(args.seeds)]
    curves, history = {}, {method: [] for method in METHODS}
    try:
        with tqdm(total=len(METHODS) * args.steps, unit="step") as bar:
            for method, step, metrics, model in train(args, splits, results["seconds"]):
                for name, values in metrics.items():
                    curves.setdefault(name, []).append(values.tolist())
                history[method].append(model)
                means = {k: f"{values.mean():.2f}" for k, values in metrics.items()}
                bar.set_description(method, refresh=False)
                bar.set_postfix({"step": step, **means}, refresh=False)
                bar.update(CHUNK)
                if step == args.steps:
                    results["methods"][method], curves = curves, {}
                    write_json(results, folder / "results.json")
    except KeyboardInterrupt:
        sys.exit(f"Interrupted: {folder} keeps what is finished, marked incomplete")
    results["drawn_seed"] = seed = median_seed(results)
    results["complete"] = True
    write_json(results, folder / "results.json")
    print_table(results)
    seconds = ", ".join(f"{k} {v:.1f} s" for k, v in results["seconds"].items())
    print(f"{seconds}; on {results['device']}, jax {versions['jax']}")
    if not args.no_plot:
        models = jax.tree.map(lambda p: p[seed], history)
        plot(results, models, splits[seed], folder / "dann_moons.png")
        animate(results, models, splits[seed], folder / "dann_moons.gif")
    print(f"Kept in {folder}")


if __name__ == "__main__":
    main()
