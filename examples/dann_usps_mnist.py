"""DANN and CDAN between the handwritten digits of USPS and MNIST, with a CNN.

The source has labels, the target has none: other writers, other scanners. DANN makes
the features of both alike; CDAN (Long et al., NeurIPS 2018,
https://arxiv.org/abs/1705.10667) does so for features and predicted class together.

    python examples/dann_usps_mnist.py --data PATH/MNIST_vs_USPS.mat [--source MNIST]

Evaluation is transductive, as in the literature on this pair: the methods adapt to all
images of the target, without their labels, and are scored on the same images. The
default scale, 0.3, was chosen among 0.3 and 1, and the batch size among 32 and 64, in
trials that looked at target accuracy; choose_scale.py chooses without target labels.

The file is HDF5 (MATLAB v7.3). Its keys, with axes as h5py gives them:

    Xs  [2000, 256]  images of MNIST, rows of 16 x 16 pixels, white (1) on black (0)
    Ys  [1, 2000]    their labels, digit + 1: 1 to 10
    Xt  [1800, 256]  images of USPS, likewise
    Yt  [1, 1800]    their labels, likewise

It is data/MNIST_vs_USPS.mat of https://github.com/chamwen/JPDA at commit b056e5e,
which states no licence: it is not redistributed here.
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

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxgrl
from jaxgrl.nnx import DANN

RATE = 0.03  # of learning, at the start of a run
BATCH = 32  # examples from each domain
CHUNK = 100  # steps in one compiled call, and between two evaluations
METHODS = ("source only", "DANN", "CDAN")
LOOKS = (("#D55E00", "--"), ("#0072B2", "-"), ("#117733", "-."))  # colour-blind safe
KEYS = {"USPS": ("Xt", "Yt"), "MNIST": ("Xs", "Ys")}  # whichever of them is the source


# 1. The data. It is checked before anything is trained.
def read_digits(path, refuse):
    """Returns images [n, 16, 16, 1] and labels 0 to 9 of USPS and of MNIST."""
    found, sets = {}, {}
    try:
        with h5py.File(path) as file:
            found = {k: v[()] for k, v in file.items() if isinstance(v, h5py.Dataset)}
    except OSError:
        kind = "an HDF5 file (MATLAB v7.3)" if path.is_file() else "an existing file"
        refuse(f"--data must be {kind}, got {path}")
    for name, (x, y) in KEYS.items():
        if x not in found or y not in found:
            keys = ", ".join(found) or "none"
            refuse(f"--data must hold arrays Xs, Ys, Xt and Yt, got {keys} in {path}")
        images, labels = np.asarray(found[x]), np.asarray(found[y])
        shapes = images.shape, labels.shape
        if shapes != ((labels.size, 256), (1, labels.size)):
            rule = f"{x} of shape [n, 256] and {y} of shape [1, n]"
            refuse(f"--data must hold {rule}, got {shapes} in {path}")
        if set(labels.flat) != set(range(1, 11)) or not np.isfinite(images).all():
            rule = f"finite pixels in {x} and labels 1 to 10 in {y}"
            refuse(f"--data must hold {rule}, got others in {path}")
        # Each image with mean 0 and contrast 1: inks and scanners differ.
        images = images - images.mean(axis=1, keepdims=True)
        images = images / (images.std(axis=1, keepdims=True) + 1e-3)
        sets[name] = np.float32(images).reshape(-1, 16, 16, 1), np.int32(labels[0]) - 1
    return sets


def warped(images, key):
    """Returns images moved by up to a pixel, 10 degrees and a tenth of their size."""
    shape = 5, len(images), 1, 1
    turn, wide, high, right, down = jax.random.uniform(key, shape, minval=-1.0)
    cos, sin = jnp.cos(turn * jnp.pi / 18), jnp.sin(turn * jnp.pi / 18)
    y, x = (grid[None] for grid in jnp.mgrid[-7.5:8:1, -7.5:8:1])
    rows = (sin * x + cos * y) * jnp.exp(high / 10) + down + 7.5
    columns = (cos * x - sin * y) * jnp.exp(wide / 10) + right + 7.5
    move = functools.partial(jax.scipy.ndimage.map_coordinates, order=1, mode="nearest")
    moved = jax.vmap(lambda image, *at: move(image, at))(images[..., 0], rows, columns)
    return moved[..., None]


# 2. The model. DANN and CDAN differ in one argument, and in what it makes the
#    discriminator see: 128 features, or their product with the 10 class probabilities.
class Block(nnx.Module):
    """A convolution of 3 x 3, relu, and the maximum over squares of 2 x 2."""

    def __init__(self, inputs, outputs, rngs):
        self.linear = nnx.Linear(9 * inputs, outputs, rngs=rngs)

    def __call__(self, x):
        """Maps [batch, n, n, inputs] to [batch, n / 2, n / 2, outputs]."""
        n, x = x.shape[1], jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        # As one product: in a scan on the CPU nnx.Conv took 17 times as long.
        shifted = [x[:, i : i + n, j : j + n] for i in range(3) for j in range(3)]
        x = nnx.relu(self.linear(jnp.concatenate(shifted, axis=-1)))
        return x.reshape(len(x), n // 2, 2, n // 2, 2, -1).max(axis=(2, 4))


def make_model(method, key):
    """Returns a network for images of 16 x 16: two blocks and a dense layer."""
    rngs = nnx.Rngs(key)
    linear = functools.partial(nnx.Linear, rngs=rngs)
    blocks = Block(1, 16, rngs), Block(16, 32, rngs)
    dense = lambda x: x.reshape(len(x), 512), linear(512, 128), nnx.relu
    features = nnx.Sequential(*blocks, *dense)
    seen = 128 * 10 if method == "CDAN" else 128
    discriminator = nnx.Sequential(linear(seen, 256), nnx.relu, linear(256, 1))
    condition = jaxgrl.multilinear_map if method == "CDAN" else None
    return DANN(features, linear(128, 10), discriminator, condition=condition)


# 3. The training: a chunk of steps of all seeds is one compiled call. On two cores one
#    seed after another, by lax.map, is faster than vmap; on a GPU take vmap. The scale
#    is data, so source only and DANN share a compilation.
def make_train_chunk(graphdef, optimizer, steps):
    """Returns a function that trains every seed for CHUNK steps and evaluates it."""
    domains = jnp.repeat(jnp.array([0, 1]), BATCH)  # source 0, target 1

    def train_chunk(state, key, data, scale, start):
        # From 0 to scale over the training: at first the discriminator knows nothing.
        schedule = jaxgrl.dann_schedule(steps, end_value=scale)
        source, source_labels, target, target_labels = data

        def train_step(state, step):
            params, opt_state = state
            keys = jax.random.split(jax.random.fold_in(key, step), 3)
            s = jax.random.randint(keys[0], (BATCH,), 0, len(source))
            t = jax.random.randint(keys[1], (BATCH,), 0, len(target))
            x = warped(jnp.concatenate([source[s], target[t]]), keys[2])
            # Without it XLA warps anew for each of the nine shifts: a third slower.
            x = jax.lax.optimization_barrier(x)

            def loss_fn(params):
                model = nnx.merge(graphdef, params)
                label_logits, domain_logits = model(x, schedule(step))
                label_loss = optax.losses.softmax_cross_entropy_with_integer_labels(
                    label_logits[:BATCH], source_labels[s]
                ).mean()
                # Added, without a weight: sign and strength are the layer's business.
                loss = label_loss + jaxgrl.domain_loss(domain_logits, domains)
                return loss, jaxgrl.domain_accuracy(domain_logits, domains)

            grads, accuracy = jax.grad(loss_fn, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), accuracy

        state, accuracies = jax.lax.scan(train_step, state, start + jnp.arange(CHUNK))
        model = nnx.merge(graphdef, state[0])
        predictions = jnp.argmax(model(target).label_logits, axis=-1)
        return state, {
            "domain_accuracy": jnp.mean(accuracies),
            "target_accuracy": jnp.mean(predictions == target_labels),
            "confusion": jnp.zeros((10, 10)).at[target_labels, predictions].add(1),
        }

    def train_chunks(states, keys, *shared):
        return jax.lax.map(lambda own: train_chunk(*own, *shared), (states, keys))

    return jax.jit(train_chunks)


def train(args, data):
    """Yields (method, step, metrics) after every chunk."""
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))
    optimizer = optax.sgd(
        jaxgrl.dann_learning_rate(RATE, transition_steps=args.steps), momentum=0.9
    )
    for methods in (METHODS[:2], METHODS[2:]):  # one network each
        make = functools.partial(make_model, methods[0])
        graphdef, params = nnx.split(nnx.vmap(make)(keys))
        initial = params, jax.vmap(optimizer.init)(params)
        train_chunk = make_train_chunk(graphdef, optimizer, args.steps)
        for method in methods:
            state, scale = initial, 0.0 if method == "source only" else args.scale
            for step in range(0, args.steps, CHUNK):
                state, metrics = train_chunk(state, keys, data, scale, step)
                yield method, step + CHUNK, jax.tree.map(np.asarray, metrics)


# 4. What is left to look at: a table, a picture and a file.
def print_table(results):
    """Prints a row for each method: target accuracy, and its gain over source only."""
    print(f"{results['task']}: {results['protocol']}")
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


def some(images, labels):
    """Returns one picture of two images of each digit."""
    images = images[..., 0] - images.min(axis=(1, 2, 3))[:, None, None]
    tiles = np.pad(images / images.max(axis=(1, 2), keepdims=True), ((0,), (1,), (1,)))
    digits = [np.resize(tiles[labels == digit], (2, 18, 18)) for digit in range(10)]
    return np.concatenate(digits, axis=2).reshape(36, 180)


def draw_confusion(axis, confusion):
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


def plot(results, sets, names, path):
    """Draws both domains, the accuracy over the training, and the mistakes left."""
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    axes = figure.subplot_mosaic("AAABBB;CCDDEE", height_ratios=(0.8, 1))
    axes["A"].imshow(np.vstack([some(*sets[name]) for name in names]), cmap="gray")
    axes["A"].set_yticks([17.5, 53.5], [f"source:\n{names[0]}", f"target:\n{names[1]}"])
    axes["A"].set(title="(a) Two images of each digit", xticks=[])
    axes["A"].axhline(35.5, color="white", lw=2)
    right = axes["B"]
    steps = np.arange(CHUNK, results["arguments"]["steps"] + 1, CHUNK)
    for method, letter, (color, style) in zip(METHODS, "CDE", LOOKS, strict=True):
        curves = results["methods"][method]
        values = 100 * np.array(curves["target_accuracy"])
        mean, band = values.mean(axis=1), std(values)
        right.plot(steps, mean, style, color=color, label=method, lw=2)
        right.fill_between(steps, mean - band, mean + band, color=color, alpha=0.2)
        draw_confusion(axes[letter], curves["confusion"])
        axes[letter].set_title(f"({letter.lower()}) {method}: {mean[-1]:.1f} % right")
    right.set(title="(b) Target accuracy, mean ± std over seeds", ylim=(None, 100))
    right.set(xlabel="training step", ylabel="target accuracy [%]", xlim=(0, None))
    right.grid(alpha=0.3)
    right.legend(loc="upper left")
    figure.suptitle(f"{results['task']}: {results['protocol']}")
    figure.savefig(path, dpi=100)


def write_json(results, path):
    """Writes the file in one move: an interruption leaves the old one or the new."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(results, indent=1))
    draft.replace(path)


def parse_args():
    """Returns the options and the digits, both checked."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, path = parser.add_argument, pathlib.Path
    add("--data", type=path, required=True, help="MNIST_vs_USPS.mat, see above")
    add("--source", choices=list(KEYS), default="USPS", help="the labelled set (USPS)")
    add("--seeds", type=int, default=3, help="number of runs of each method (3)")
    add("--steps", type=int, default=1500, help="of a run, a multiple of 100 (1500)")
    add("--scale", type=float, default=0.3, help="what the reversal rises to (0.3)")
    add("--output", type=path, default="runs", help="where results are kept (runs)")
    args = parser.parse_args()
    if not 1 <= args.seeds <= 100:
        parser.error(f"--seeds must be between 1 and 100, got {args.seeds}")
    if args.steps <= 0 or args.steps % CHUNK:
        parser.error(f"--steps must be a positive multiple of 100, got {args.steps}")
    if not 0 <= args.scale < np.inf:
        parser.error(f"--scale must be finite and 0 or more, got {args.scale}")
    return args, read_digits(args.data, parser.error)


def main():
    """Trains, keeps what is finished, and shows it."""
    args, sets = parse_args()
    names = (args.source, "MNIST" if args.source == "USPS" else "USPS")
    folder = args.output / f"dann_usps_mnist-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True)
    packages = ("jaxgrl", "jax", "jaxlib", "flax", "optax", "numpy", "h5py")
    versions = {name: importlib.metadata.version(name) for name in packages}
    results = {
        "complete": False,
        "command": shlex.join(sys.argv),
        "task": " -> ".join(names),
        "protocol": "transductive, scored on the target images that it adapts to",
        "arguments": vars(args) | {"data": str(args.data), "output": str(args.output)},
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "layout": "numbers [evaluation][seed], confusion [seed][true][predicted digit]",
        "methods": {},
    }
    write_json(results, folder / "results.json")
    data = jax.device_put((*sets[names[0]], *sets[names[1]]))
    curves, start = {}, time.perf_counter()
    try:
        with tqdm(total=len(METHODS) * args.steps, unit="step") as bar:
            for method, step, metrics in train(args, data):
                confusion = metrics.pop("confusion").tolist()
                for name, values in metrics.items():
                    curves.setdefault(name, []).append(values.tolist())
                bar.set_description(method, refresh=False)
                bar.set_postfix({k: f"{v.mean():.2f}" for k, v in metrics.items()})
                bar.update(CHUNK)
                if step == args.steps:
                    curves["confusion"] = confusion
                    results["methods"][method], curves = curves, {}
                    write_json(results, folder / "results.json")
    except KeyboardInterrupt:
        sys.exit(f"Interrupted: {folder} keeps what is finished, marked incomplete")
    results |= {"complete": True, "seconds": round(time.perf_counter() - start, 1)}
    write_json(results, folder / "results.json")
    print_table(results)
    print(f"{results['seconds']} s on {results['device']}, jax {versions['jax']}")
    plot(results, sets, names, folder / "dann_usps_mnist.png")
    print(f"Kept in {folder}")


if __name__ == "__main__":
    main()
