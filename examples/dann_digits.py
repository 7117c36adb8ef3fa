"""Domain-adversarial training (DANN) from upright to rotated digits, in Flax NNX.

The source domain is scikit-learn's handwritten digits with their labels. The target
domain is other images of the same kind, rotated and without labels. A classifier that
is trained on the source alone loses half of its accuracy on the target. DANN trains a
domain discriminator on the features, and a gradient reversal layer between the two
makes the features of both domains alike, so that the classifier serves both.

    python examples/dann_digits.py            # 3 methods x 5 seeds
    python examples/dann_digits.py --help

Ganin and Lempitsky, Unsupervised Domain Adaptation by Backpropagation, ICML 2015,
https://proceedings.mlr.press/v37/ganin15.html
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
import sklearn.decomposition
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxgrl
from jaxgrl.nnx import GradientReversal

BATCH = 64  # examples from each domain
CHUNK = 100  # steps in one compiled call, and between two evaluations
METHODS = ("source only", "DANN", "trained on target")
COLORS = (  # one a digit: Tol's muted scheme, which colour-blind readers can tell apart
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777"),
)


# 1. The model. The layer stands between the features and the discriminator: forward it
#    is the identity, backward it turns the discriminator's gradient round.
class DANN(nnx.Module):
    """A feature extractor, a label classifier and a domain discriminator."""

    def __init__(self, rngs: nnx.Rngs):
        self.features = nnx.Sequential(nnx.Linear(64, 100, rngs=rngs), nnx.relu)
        self.classifier = nnx.Linear(100, 10, rngs=rngs)
        self.reversal = GradientReversal()
        self.discriminator = nnx.Sequential(
            nnx.Linear(100, 100, rngs=rngs), nnx.relu, nnx.Linear(100, 1, rngs=rngs)
        )

    def __call__(self, x, scale):
        """Returns the label logits [batch, 10] and the domain logits [batch, 1]."""
        features = self.features(x)
        domain_logits = self.discriminator(self.reversal(features, scale))
        return self.classifier(features), domain_logits


# 2. The loss. Both terms are minimised, so they are added: the reversal is in the
#    layer, and so is its strength. A weight on the domain loss would apply it twice.
def loss_fn(model, source, labels, target, scale):
    """Returns the loss and the three numbers to watch, for one batch of each domain."""
    domains = jnp.repeat(jnp.array([0, 1]), BATCH)  # source 0, target 1
    label_logits, domain_logits = model(jnp.concatenate([source, target]), scale)
    label_loss = optax.losses.softmax_cross_entropy_with_integer_labels(
        label_logits[:BATCH], labels
    ).mean()
    domain_loss = jaxgrl.domain_loss(domain_logits, domains)
    metrics = {
        "label_loss": label_loss,
        "domain_loss": domain_loss,
        "domain_accuracy": jaxgrl.domain_accuracy(domain_logits, domains),
    }
    return label_loss + domain_loss, metrics


# 3. The data. Source, target and test are disjoint images. The target's labels train
#    the ceiling and nothing else; the test's labels only score.
def make_data(angle, seed):
    """Returns one random split of the digits: upright source, rotated target, test."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    rotated = scipy.ndimage.rotate(images, angle, (2, 1), reshape=False, order=1)
    order = np.random.default_rng(seed).permutation(len(images))
    source, target, test = np.split(order, [650, 1300])
    return {
        "source": images[source].reshape(-1, 64),
        "source_labels": labels[source],
        "target": rotated[target].reshape(-1, 64),
        "target_labels": labels[target],
        "test": rotated[test].reshape(-1, 64),
        "test_labels": labels[test],
    }


# 4. The training: a chunk of steps is one lax.scan, and vmap runs all seeds at once.
#    The scale is data, so the three methods share a single compilation.
def make_train_chunk(graphdef, optimizer, steps):
    """Returns a function that trains every seed for CHUNK steps and evaluates it."""

    def train_chunk(state, data, key, scale, start):
        # From 0 to scale over the training: at first the discriminator knows nothing.
        schedule = jaxgrl.dann_schedule(steps, end_value=scale)

        def train_step(state, step):
            params, opt_state = state
            source_key, target_key = jax.random.split(jax.random.fold_in(key, step))
            s = jax.random.randint(source_key, (BATCH,), 0, len(data["source"]))
            t = jax.random.randint(target_key, (BATCH,), 0, len(data["target"]))
            batch = data["source"][s], data["source_labels"][s], data["target"][t]

            def loss(params):
                return loss_fn(nnx.merge(graphdef, params), *batch, schedule(step))

            grads, metrics = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), metrics

        state, metrics = jax.lax.scan(train_step, state, start + jnp.arange(CHUNK))
        metrics = jax.tree.map(jnp.mean, metrics)
        model = nnx.merge(graphdef, state[0])
        predictions = jnp.argmax(model(data["test"], 0.0)[0], axis=-1)
        metrics["target_accuracy"] = jnp.mean(predictions == data["test_labels"])
        return state, metrics

    return jax.jit(jax.vmap(train_chunk, in_axes=(0, 0, 0, None, None)))


def train(args, seconds):
    """Yields (method, step, metrics, model of the first seed) after every chunk."""
    graphdef = nnx.graphdef(DANN(nnx.Rngs(0)))
    splits = [make_data(args.angle, seed) for seed in range(args.seeds)]
    data = jax.tree.map(lambda *arrays: jnp.stack(arrays), *splits)
    # The ceiling is the same training with the target's images and labels as source.
    ceiling = data | {"source": data["target"], "source_labels": data["target_labels"]}
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))
    learning_rate = jaxgrl.dann_learning_rate(
        args.learning_rate, transition_steps=args.steps
    )
    optimizer = optax.sgd(learning_rate, momentum=0.9)

    @jax.vmap
    def init(key):
        params = nnx.state(DANN(nnx.Rngs(key)))
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
            first = jax.tree.map(lambda p: p[0], state[0])
            yield method, step + CHUNK, metrics, nnx.merge(graphdef, first)


# 5. What is left to look at: a table, a picture and a file.
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


def plot(results, features, labels, path):
    """Draws the accuracies over the steps, and the features of both domains."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    (left, right), maps = figure.subplots(2, 2)
    looks = {METHODS[0]: ("#D55E00", "--"), "DANN": ("#0072B2", "-")}
    arguments = results["arguments"]
    steps = np.arange(CHUNK, arguments["steps"] + 1, CHUNK)

    def draw(axis, method, name, factor):
        color, style = looks.get(method, ("0.35", ":"))
        values = factor * np.array(results["methods"][method][name])
        mean, band = values.mean(axis=1), std(values)
        axis.plot(steps, mean, style, color=color, label=method, linewidth=2)
        axis.fill_between(steps, mean - band, mean + band, color=color, alpha=0.2, lw=0)

    for method in METHODS:
        draw(left, method, "target_accuracy", 100)
    for method in METHODS[:2]:
        draw(right, method, "domain_accuracy", 1)
    schedule = jaxgrl.dann_schedule(arguments["steps"], end_value=arguments["scale"])
    right.plot(steps, schedule(steps), "-.", color="#009E73", label="scale of DANN")
    right.axhline(0.5, color="black", lw=0.8)
    right.annotate("0.5: domains confused", (steps[-1], 0.48), ha="right", va="top")
    left.set(title="(a) Target accuracy, mean ± std over seeds", ylim=(0, 100))
    left.set(xlabel="training step", ylabel="target accuracy [%]")
    right.set(title="(b) Domain accuracy and scale", ylim=(0, None))
    right.set(xlabel="training step", ylabel="domain accuracy, scale [1]")
    for axis in (left, right):
        axis.legend(loc="lower right")
        axis.grid(alpha=0.3)
    maps[0].set(title="(c) Features before adaptation: source only")
    maps[1].set(title="(c) Features after adaptation: DANN")
    for axis, method in zip(maps, METHODS, strict=False):
        draw_features(axis, features[method], labels)
    figure.savefig(path, dpi=120)


def draw_features(axis, features, labels):
    """Draws source and target features on the two principal components of both."""
    pca = sklearn.decomposition.PCA(2).fit(np.concatenate(features))
    source, target = (pca.transform(values) for values in features)
    full = {"marker": "o", "ls": "", "alpha": 0.6}
    hollow = {"marker": "^", "ls": "", "fillstyle": "none"}
    for digit, color in enumerate(COLORS):
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
    add("--angle", type=float, default=25.0, help="rotation of the target in degrees")
    add("--seeds", type=int, default=5, help="number of runs of each method")
    add("--steps", type=int, default=4000, help=f"of each run, a multiple of {CHUNK}")
    add("--scale", type=float, default=1.0, help="what the reversal strength rises to")
    add("--learning-rate", type=float, default=0.01, help="at the start of a run")
    add("--output", type=pathlib.Path, default="runs", help="where results are kept")
    add("--no-plot", action="store_true", help="leave out the picture")
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
    folder = args.output / f"dann_digits-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
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
    split = make_data(args.angle, seed=0)
    curves, features = {}, {}
    try:
        with tqdm(total=len(METHODS) * args.steps, unit="step") as bar:
            for method, step, metrics, model in train(args, results["seconds"]):
                for name, values in metrics.items():
                    curves.setdefault(name, []).append(values.tolist())
                means = {k: f"{values.mean():.2f}" for k, values in metrics.items()}
                bar.set_description(method, refresh=False)
                bar.set_postfix({"step": step, **means}, refresh=False)
                bar.update(CHUNK)
                if step == args.steps:
                    results["methods"][method], curves = curves, {}
                    domains = split["source"], split["test"]
                    features[method] = [model.features(x) for x in domains]
                    write_json(results, folder / "results.json")
    except KeyboardInterrupt:
        sys.exit(f"Interrupted: {folder} keeps what is finished, marked incomplete")
    results["complete"] = True
    write_json(results, folder / "results.json")
    print_table(results)
    seconds = ", ".join(f"{k} {v:.1f} s" for k, v in results["seconds"].items())
    print(f"{seconds}; on {results['device']}, jax {versions['jax']}")
    if not args.no_plot:
        labels = [split["source_labels"], split["test_labels"]]
        plot(results, features, labels, folder / "dann_digits.png")
    print(f"Kept in {folder}")


if __name__ == "__main__":
    main()
