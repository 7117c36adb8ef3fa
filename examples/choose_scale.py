"""Chooses the reversal strength of a DANN without a single target label.

Every scale of a grid, with every seed, is trained in one vmapped, jitted program: the
scale is data, so it can be mapped like any other array. InfoMax judges each run from
its target predictions: are they certain, and are all the classes used? Among the scales
that are not clearly worse than the best one, the rule takes the scale nearest to 1.

    python examples/choose_scale.py

It prints the grid with its chosen row, and keeps that, every number and a picture in a
new folder under runs/. The picture shows the true target accuracy beside InfoMax; it is
not used for the choice.
"""

import argparse
import datetime
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
import scipy.ndimage
import sklearn.datasets
from flax import nnx
from matplotlib.figure import Figure

import jaxgrl
from jaxgrl.nnx import DANN

SCALES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
BATCH = 64  # examples from each domain


# 1. The rule. Of those that benchmarks/adaptation.py compares, it loses least at worst.
def choose(scales, scores):
    """Returns the index of the scale nearest to 1 that is no clearly worse than best.

    A scale is *not clearly worse* if its mean difference to the best scale, paired by
    seed, is at most one standard error of that mean. Near is meant on a logarithmic
    scale, so 0 is farthest. Of two equally near, the one with the better mean wins.

    Args:
      scales: The grid.
      scores: InfoMax, ``[scales, seeds]``, with the same seeds in every row, and two or
        more. A scale with a score that is not finite is out.

    Raises:
      ValueError: If every scale is out, or there is one seed only.
    """
    scores = np.where(np.isfinite(scores), scores, np.nan).astype(np.float64)
    count = scores.shape[1]
    if count < 2:
        raise ValueError(f"scores must be of 2 or more seeds, got {count}")
    means = scores.mean(axis=1)
    if np.isnan(means).all():
        raise ValueError("every scale diverged; lower the learning rate")
    lost = scores[np.nanargmax(means)] - scores
    error = lost.std(axis=1, ddof=1) / np.sqrt(count)
    close = np.flatnonzero(lost.mean(axis=1) <= error)
    with np.errstate(divide="ignore"):
        distance = np.abs(np.log(scales))
    return int(min(close, key=lambda i: (distance[i], -means[i])))


# 2. The training, a pure function of its key and the scale.
def train(key, scale, source, labels, target, steps):
    """Trains a DANN; returns a function from inputs to label logits."""
    init_key, batch_key = jax.random.split(key)
    rngs = nnx.Rngs(init_key)
    model = DANN(
        nnx.Sequential(nnx.Linear(64, 100, rngs=rngs), nnx.relu),
        nnx.Linear(100, 10, rngs=rngs),
        nnx.Sequential(
            nnx.Linear(100, 100, rngs=rngs), nnx.relu, nnx.Linear(100, 1, rngs=rngs)
        ),
    )
    graphdef, params = nnx.split(model)
    schedule = jaxgrl.dann_schedule(steps, end_value=scale)
    rate = jaxgrl.dann_learning_rate(0.01, transition_steps=steps)
    optimizer = optax.sgd(rate, momentum=0.9)
    domains = jnp.repeat(jnp.array([0, 1]), BATCH)

    def loss(params, step):
        keys = jax.random.split(jax.random.fold_in(batch_key, step))
        s = jax.random.randint(keys[0], (BATCH,), 0, len(source))
        t = jax.random.randint(keys[1], (BATCH,), 0, len(target))
        model = nnx.merge(graphdef, params)
        x = jnp.concatenate([source[s], target[t]])
        label_logits, domain_logits = model(x, schedule(step))
        label_losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            label_logits[:BATCH], labels[s]
        )
        return label_losses.mean() + jaxgrl.domain_loss(domain_logits, domains)

    def train_step(state, step):
        params, opt_state = state
        grads = jax.grad(loss)(params, step)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    state = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(train_step, state, jnp.arange(steps))
    model = nnx.merge(graphdef, params)
    return lambda x: model.label_classifier(model.feature_extractor(x))


# 3. One run: train, judge without target labels, and score with them.
def run(scale, key, data, steps):
    """Returns InfoMax and the true target accuracy of one run."""
    target = data["target"]
    predict = train(key, scale, data["source"], data["labels"], target, steps)
    test_logits = predict(data["test"])
    accuracy = jnp.mean(jnp.argmax(test_logits, axis=-1) == data["test_labels"])
    finite = jnp.all(jnp.isfinite(test_logits))
    return {
        "InfoMax": jaxgrl.information_maximization(predict(target)),
        "target accuracy": jnp.where(finite, accuracy, jnp.nan),
    }


def make_data(angle, seed):
    """Returns upright source, rotated target and rotated test images; disjoint."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    rotated = scipy.ndimage.rotate(images, angle, (2, 1), reshape=False, order=1)
    images, rotated = images.reshape(-1, 64), rotated.reshape(-1, 64)
    order = np.random.default_rng(seed).permutation(len(images))
    source, target, test = np.split(order, [520, 1170])
    return {
        "source": images[source],
        "labels": labels[source],
        "target": rotated[target],
        "test": rotated[test],
        "test_labels": labels[test],
    }


# 4. What is left to look at.
def print_grid(scales, grid, chosen):
    """Prints a row for each scale, and what the chosen one loses."""
    scores, truth = grid["InfoMax"], 100 * grid["target accuracy"]
    print(f"{'scale':>8}{'InfoMax':>10}{'target accuracy [%]':>23}  (not used)")
    for i, scale in enumerate(scales):
        mark = " <- chosen" if i == chosen else ""
        broken = int(np.sum(~np.isfinite(scores[i])))
        mark += f" diverged: {broken} of {len(scores[i])} runs" if broken else ""
        accuracy = f"{truth[i].mean():.1f} ± {truth[i].std(ddof=1):3.1f}"
        print(f"{scale:8g}{scores[i].mean():10.3f}{accuracy:>23}{mark}")
    means = truth.mean(axis=1)
    regret = np.nanmax(means) - means[chosen]
    print(f"best fixed scale: {scales[np.nanargmax(means)]:g}")
    print(f"the rule chooses {scales[chosen]:g}, and loses {regret:.1f} points")


def plot(scales, grid, chosen, angle, path):
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
        axis.grid(alpha=0.3)
    above.set_title(f"Digits rotated by {angle:g} degrees: the criterion")
    below.set_title("What it is to find, unseen: the true accuracy")
    below.set_xticks(x, [f"{scale:g}" for scale in scales])
    below.set_xlabel("scale")
    figure.savefig(path, dpi=120)


def parse_args():
    """Returns the options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--angle", type=float, default=35.0, help="of the target, degrees (default: 35)"
    )
    add("--seeds", type=int, default=5, help="runs of each scale (default: 5)")
    add("--steps", type=int, default=4000, help="of each run (default: 4000)")
    add("--scales", type=float, nargs="+", default=SCALES, help="the grid")
    add("--output", type=pathlib.Path, default="runs", help="folder (default: runs)")
    args = parser.parse_args()

    def check(option, value, holds, rule):
        if not holds:
            parser.error(f"--{option} must be {rule}, got {value}")

    check("angle", args.angle, -180 <= args.angle <= 180, "between -180 and 180")
    check("seeds", args.seeds, 2 <= args.seeds <= 100, "between 2 and 100")
    check("steps", args.steps, 1 <= args.steps <= 10**6, "between 1 and 1000000")
    positive = all(0 <= scale < np.inf for scale in args.scales)
    check("scales", args.scales, positive, "finite and 0 or more")
    return args


def main():
    """Trains the grid at once and one by one, chooses, keeps and shows it."""
    args = parse_args()
    now = datetime.datetime.now()
    folder = args.output / f"choose_scale-{now:%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True)
    splits = [make_data(args.angle, seed) for seed in range(args.seeds)]
    data = jax.tree.map(lambda *arrays: jnp.stack(arrays), *splits)
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))
    scales = jnp.array(args.scales, jnp.float32)

    def one(scale, key, data):
        return run(scale, key, data, args.steps)

    def clock(function, *arguments):
        program = jax.jit(function).lower(*arguments).compile()
        start = time.perf_counter()
        grid = jax.block_until_ready(program(*arguments))
        return grid, program, time.perf_counter() - start

    # The whole grid is one program: over the scales outside, over the seeds inside.
    every_seed = jax.vmap(one, in_axes=(None, 0, 0))
    every_run = jax.vmap(every_seed, in_axes=(0, None, None))
    try:
        grid, _, together = clock(every_run, scales, keys, data)
        first = scales[0], keys[0], jax.tree.map(lambda a: a[0], data)
        _, program, single = clock(one, *first)
        start = time.perf_counter()
        for i in range(len(scales) * args.seeds - 1):
            seed = i % args.seeds
            own = jax.tree.map(lambda a, s=seed: a[s], data)
            jax.block_until_ready(program(scales[i // args.seeds], keys[seed], own))
        in_turn = single + time.perf_counter() - start
    except KeyboardInterrupt:
        folder.rmdir()
        sys.exit("Interrupted: the grid is one program, so nothing was finished")
    grid = {name: np.asarray(values) for name, values in grid.items()}
    try:
        chosen = choose(args.scales, grid["InfoMax"])
    except ValueError as error:
        folder.rmdir()
        sys.exit(f"No scale can be chosen: {error}")
    print_grid(args.scales, grid, chosen)
    seconds = {"one vmapped program": together, "one run after another": in_turn}
    packages = ("jaxgrl", "jax", "flax", "optax", "scikit-learn")
    versions = {name: importlib.metadata.version(name) for name in packages}
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    print(
        f"{len(scales) * args.seeds} runs: {times}; on {device}, jax {jax.__version__}"
    )
    results = {
        "command": shlex.join(sys.argv),
        "date": now.astimezone().isoformat(timespec="seconds"),
        "device": device,
        "versions": {"python": platform.python_version(), **versions},
        "seconds": seconds,
        "scales": list(args.scales),
        "chosen": args.scales[chosen],
        "layout": "grid[number][scale][seed]",
        "grid": {name: values.tolist() for name, values in grid.items()},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    plot(args.scales, grid, chosen, args.angle, folder / "choose_scale.png")
    print(f"Kept in {folder}")


if __name__ == "__main__":
    main()
