"""Chooses the reversal strength of a DANN without a single target label.

Every scale of a grid, with every seed, is trained in one vmapped, jitted program: the
scale is data, so it can be mapped like any other array. Three criteria that need no
target label then judge the runs, on rotated digits here:

    InfoMax              are its answers certain, and are all the classes used?
    centroid agreement   does the classifier agree with the nearest source class mean?
    reverse validation   trained on its answers as labels, how right is a second network
                         on held-out source images?

    python examples/choose_scale.py

It prints the grid with its chosen row, and keeps that, every number and a picture in a
new folder under runs/. The picture shows the true target accuracy beside the criteria;
it is not used for the choice.
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
from collections.abc import Callable
from typing import Any

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
CRITERIA = ("InfoMax", "centroid agreement", "reverse validation")
DEFAULT = CRITERIA[0]  # by benchmarks/adaptation.py, the one that loses least


# 1. The criteria. The first is jaxgrl.information_maximization. Whatever is not finite
#    makes them nan, so that a run that diverged is never chosen.
def centroid_agreement(
    source_features: jax.Array,
    source_labels: jax.Array,
    target_features: jax.Array,
    target_logits: jax.Array,
) -> jax.Array:
    """Returns how often the classifier agrees with the nearest class centroid.

    Args:
      source_features: ``[n, F]``; their means over each class are the centroids.
      source_labels: ``[n]``, from 0 to C - 1, each class at least once.
      target_features: ``[m, F]``.
      target_logits: ``[m, C]``.

    References:
      Our own; its relatives are the pseudo-labels of Liang et al., Do We Really Need to
      Access the Source Data?, ICML 2020, https://arxiv.org/abs/2002.08546
    """
    member = jax.nn.one_hot(source_labels, target_logits.shape[1])
    centroids = member.T @ source_features / jnp.sum(member, axis=0)[:, None]
    # The squared distance, but for the target's own length.
    distances = jnp.sum(centroids**2, axis=1)[None] - 2 * target_features @ centroids.T
    agree = jnp.argmin(distances, axis=1) == jnp.argmax(target_logits, axis=1)
    finite = jnp.all(jnp.isfinite(distances)) & jnp.all(jnp.isfinite(target_logits))
    return jnp.where(finite, jnp.mean(agree), jnp.nan)


def reverse_validation(
    fit: Callable[[jax.Array], Callable[[jax.Array], jax.Array]],
    target_logits: jax.Array,
    source_inputs: jax.Array,
    source_labels: jax.Array,
) -> jax.Array:
    """Returns the accuracy, on held-out source examples, of a network trained back.

    Args:
      fit: Trains a network like the first, with the roles of the domains swapped, on
        the target's labels that it is given; returns a function from inputs to label
        logits.
      target_logits: What the first network says of the target, ``[m, classes]``.
      source_inputs: Source examples that neither training has seen, ``[n, ...]``.
      source_labels: Their labels, ``[n]``.

    References:
      Zhong et al., Cross Validation Framework to Choose Amongst Models and Datasets for
      Transfer Learning, ECML PKDD 2010; Ganin et al., Domain-Adversarial Training of
      Neural Networks, JMLR 17, 2016, section 5.1.1
    """
    predict = fit(jnp.argmax(target_logits, axis=-1))
    logits = predict(source_inputs)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == source_labels)
    finite = jnp.all(jnp.isfinite(target_logits)) & jnp.all(jnp.isfinite(logits))
    return jnp.where(finite, accuracy, jnp.nan)


# 2. The training, a pure function of its key and the scale.
def train(key, scale, source, labels, target, steps):
    """Trains a DANN; returns a function from inputs to features and label logits."""
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
    optimizer = optax.sgd(
        jaxgrl.dann_learning_rate(0.01, transition_steps=steps), momentum=0.9
    )
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

    def predict(x):
        features = model.feature_extractor(x)
        return features, model.label_classifier(features)

    return predict


# 3. One run: train, judge without target labels, and score with them.
def run(scale, key, data, steps):
    """Returns the criteria and the true target accuracy of one run."""
    source, labels, target = data["source"], data["labels"], data["target"]
    predict = train(key, scale, source, labels, target, steps)

    def fit(answers):
        reverse_key = jax.random.fold_in(key, 1)
        back = train(reverse_key, scale, target, answers, source, steps)
        return lambda x: back(x)[1]

    source_features, _ = predict(source)
    target_features, target_logits = predict(target)
    test_logits = predict(data["test"])[1]
    accuracy = jnp.mean(jnp.argmax(test_logits, axis=-1) == data["test_labels"])
    return {
        "InfoMax": jaxgrl.information_maximization(target_logits),
        "centroid agreement": centroid_agreement(
            source_features, labels, target_features, target_logits
        ),
        "reverse validation": reverse_validation(
            fit, target_logits, data["valid"], data["valid_labels"]
        ),
        "target accuracy": jnp.where(
            jnp.all(jnp.isfinite(test_logits)), accuracy, jnp.nan
        ),
    }


def make_data(angle, seed):
    """Returns upright source, held-out source, rotated target and test; disjoint."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    rotated = scipy.ndimage.rotate(images, angle, (2, 1), reshape=False, order=1)
    images, rotated = images.reshape(-1, 64), rotated.reshape(-1, 64)
    order = np.random.default_rng(seed).permutation(len(images))
    source, valid, target, test = np.split(order, [520, 650, 1300])
    return {
        "source": images[source],
        "labels": labels[source],
        "valid": images[valid],
        "valid_labels": labels[valid],
        "target": rotated[target],
        "test": rotated[test],
        "test_labels": labels[test],
    }


def choose(grid: dict[str, Any], criterion: str) -> int:
    """Returns the row with the best mean over the seeds; a diverged row has none."""
    means = np.mean(grid[criterion], axis=1)
    if not np.isfinite(means).any():
        sys.exit("Every scale diverged: lower the learning rate")
    return int(np.nanargmax(means))


# 4. What is left to look at.
def print_grid(scales, grid):
    """Prints a row for each scale, what each criterion chooses, and its regret."""
    truth = 100 * np.mean(grid["target accuracy"], axis=1)
    print(f"{'scale':>8}" + "".join(f"{name:>20}" for name in CRITERIA), end="")
    print(f"{'target accuracy [%]':>23}  (not used)")
    for i, scale in enumerate(scales):
        cells = [np.mean(grid[name][i]) for name in CRITERIA]
        row = f"{scale:8g}" + "".join(f"{value:20.3f}" for value in cells)
        mark = " <- chosen" if i == choose(grid, DEFAULT) else ""
        broken = int(np.sum(~np.isfinite(grid["target accuracy"][i])))
        mark += f" diverged: {broken} of {len(grid[DEFAULT][i])} runs" if broken else ""
        std = 100 * np.std(grid["target accuracy"][i], ddof=1)
        print(row + f"{truth[i]:17.1f} ± {std:3.1f}" + mark)
    print(f"best fixed scale: {scales[np.nanargmax(truth)]:g}")
    for name in CRITERIA:
        i = choose(grid, name)
        regret = np.nanmax(truth) - truth[i]
        print(f"{name:20} chooses {scales[i]:g}, and loses {regret:.1f} points")


def plot(scales, grid, angle, path):
    """Draws each criterion over the scale, with the true target accuracy beside it."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    x = np.arange(len(scales))
    truth = 100 * np.array(grid["target accuracy"])
    for axis, name in zip(figure.subplots(1, 3), CRITERIA, strict=True):
        values = np.array(grid[name])
        axis.plot(x, values, "o", color="#0072B2", alpha=0.35, ms=4, mew=0)
        axis.plot(x, values.mean(axis=1), "-", color="#0072B2", lw=2)
        i = choose(grid, name)
        axis.plot(i, values.mean(axis=1)[i], "*", color="#0072B2", ms=18, mec="white")
        unit = " [nats]" if name == "InfoMax" else ""
        axis.set_ylabel(f"{name}{unit}", color="#0072B2")
        other = axis.twinx()
        other.plot(x, truth.mean(axis=1), "--", color="#D55E00", lw=2)
        other.set_ylabel("target accuracy [%], not used", color="#D55E00")
        other.set_ylim(0, 100)
        regret = np.nanmax(truth.mean(axis=1)) - truth.mean(axis=1)[i]
        axis.set_title(f"{name}\nchooses {scales[i]:g}, loses {regret:.1f} points")
        axis.set_xticks(x, [f"{scale:g}" for scale in scales])
        axis.set_xlabel("scale")
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"Digits rotated by {angle:g} degrees; dots are runs, the star chosen"
    )
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
    print_grid(args.scales, grid)
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
        "chosen": {name: args.scales[choose(grid, name)] for name in CRITERIA},
        "layout": "grid[number][scale][seed]",
        "grid": {name: values.tolist() for name, values in grid.items()},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    plot(args.scales, grid, args.angle, folder / "choose_scale.png")
    print(f"Kept in {folder}")


if __name__ == "__main__":
    main()
