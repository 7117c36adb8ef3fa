"""Features that say less about a protected attribute, with the parts of a DANN.

scikit-learn's diabetes data: 442 patients, nine measurements and their sex, which is
kept from the inputs, and the progression of the disease a year later. The network
predicts the progression; its "domains" are the two sexes, so the reversed gradient
takes out of the features what tells them apart. Nothing else differs from adaptation,
but that every patient is labelled.

    python examples/fair_diabetes.py

For each scale, on 142 patients that no training has seen: R2 of the prediction, the
proxy A-distance of the sexes by their features (0: a linear classifier cannot tell
them apart), and the gap between the mean predictions for the two.

What it shows: features can lose part of what they say at no cost in R2. What it does
not: that a decision is fair. The sexes differ in blood values, a stronger classifier
may find what a linear one does not, 442 patients are few, and invariance is one notion
of fairness among several.
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

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import sklearn.datasets
from flax import nnx
from matplotlib.figure import Figure

import jaxgrl
from jaxgrl.nnx import DANN

SCALES = (0.0, 0.1, 0.3, 1.0, 3.0)
TRAIN, BATCH = 300, 64
MEASURES = {  # and the unit of the axis
    "R2 of the prediction": "share of the variance",
    "proxy A-distance of the sexes": "0 to 2",
    "gap of the mean predictions": "standard deviations",
}


def load():
    """Returns nine measurements, the progression, both standardised, and the sex."""
    x, y = map(
        np.asarray, sklearn.datasets.load_diabetes(return_X_y=True, scaled=False)
    )
    sex = (x[:, 1] > 1).astype(np.int32)
    x = np.delete(x, 1, axis=1)
    x, y = ((a - a.mean(axis=0)) / a.std(axis=0) for a in (x, y))
    return x.astype(np.float32), y.astype(np.float32), sex


def train(scale, key, rows, patients, steps):
    """Trains on the rows; returns features and prediction of every patient."""
    x, y, sex = patients
    init_key, batch_key = jax.random.split(key)
    linear = functools.partial(nnx.Linear, rngs=nnx.Rngs(init_key))
    model = DANN(
        feature_extractor=nnx.Sequential(linear(9, 8), nnx.relu),
        label_classifier=linear(8, 1),
        domain_discriminator=nnx.Sequential(linear(8, 8), nnx.relu, linear(8, 1)),
    )
    graphdef, params = nnx.split(model)
    schedule = jaxgrl.dann_schedule(steps, end_value=scale)
    optimizer = optax.chain(
        optax.add_decayed_weights(1e-2),
        optax.sgd(
            jaxgrl.dann_learning_rate(0.05, transition_steps=steps), momentum=0.9
        ),
    )

    def train_step(state, step):
        params, opt_state = state
        pick = jax.random.randint(
            jax.random.fold_in(batch_key, step), (BATCH,), 0, TRAIN
        )
        batch = rows[pick]

        def loss(params):
            prediction, sex_logits = nnx.merge(graphdef, params)(
                x[batch], schedule(step)
            )
            error = jnp.mean((prediction[:, 0] - y[batch]) ** 2)
            return error + jaxgrl.domain_loss(sex_logits, sex[batch])

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    state = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(train_step, state, jnp.arange(steps))
    model = nnx.merge(graphdef, params)
    features = model.feature_extractor(x)
    return features, model.label_classifier(features)[:, 0]


def measure(features, prediction, y, sex):
    """Returns the three measures of held-out patients, in the order of MEASURES."""
    residual = np.sum((prediction - y) ** 2) / np.sum((y - y.mean()) ** 2)
    distance = jaxgrl.proxy_a_distance(features[sex == 0], features[sex == 1]).distance
    return (
        1 - residual,
        distance,
        prediction[sex == 1].mean() - prediction[sex == 0].mean(),
    )


def plot(values, path):
    """Draws the three measures over the scale."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    places = np.arange(len(SCALES))
    for i, (axis, name) in enumerate(zip(figure.subplots(1, 3), MEASURES, strict=True)):
        mean, std = values[..., i].mean(axis=1), values[..., i].std(axis=1, ddof=1)
        axis.errorbar(places, mean, std, fmt="o-", color="#0072B2", capsize=3)
        axis.set(title=name, xlabel="scale", ylabel=MEASURES[name])
        axis.set_xticks(places, [f"{scale:g}" for scale in SCALES])
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
    figure.suptitle("Held-out patients, mean ± standard deviation over splits")
    figure.savefig(path, dpi=110)


def parse_args():
    """Returns the options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=20, help="number of splits (default: 20)")
    add("--steps", type=int, default=1000, help="of each run (default: 1000)")
    add("--output", type=pathlib.Path, default="runs", help="folder (default: runs)")
    args = parser.parse_args()
    if not 2 <= args.seeds <= 1000:
        parser.error(f"--seeds must be between 2 and 1000, got {args.seeds}")
    if not 1 <= args.steps <= 10**6:
        parser.error(f"--steps must be between 1 and 1000000, got {args.steps}")
    return args


def main():
    """Trains every scale on every split at once, measures, keeps and shows it."""
    args = parse_args()
    now = datetime.datetime.now()
    x, y, sex = load()
    orders = [np.random.default_rng(s).permutation(len(y)) for s in range(args.seeds)]
    rows = np.stack(orders)
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))

    def one(scale, key, rows):
        whole = jnp.asarray(x), jnp.asarray(y), jnp.asarray(sex)
        return train(scale, key, rows, whole, args.steps)

    every = jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, None, None))
    try:
        found = jax.jit(every)(jnp.array(SCALES), keys, rows[:, :TRAIN])
        features, predictions = map(np.asarray, found)
        values = np.array(
            [
                [
                    measure(
                        features[i, s][test],
                        predictions[i, s][test],
                        y[test],
                        sex[test],
                    )
                    for s, test in enumerate(rows[:, TRAIN:])
                ]
                for i in range(len(SCALES))
            ]
        )
    except KeyboardInterrupt:
        sys.exit("Interrupted: nothing was finished, and nothing is kept")
    print(f"{'scale':>6}" + "".join(f"{name:>32}" for name in MEASURES))
    for scale, runs in zip(SCALES, values, strict=True):
        cells = (
            f"{m:.3f} ± {d:.3f}"
            for m, d in zip(runs.mean(0), runs.std(0, ddof=1), strict=True)
        )
        print(f"{scale:6g}" + "".join(f"{cell:>32}" for cell in cells))
    change = values[SCALES.index(1.0)] - values[0]
    half = scipy.stats.t.ppf(0.975, args.seeds - 1) * scipy.stats.sem(change)
    for name, mean, h in zip(MEASURES, change.mean(axis=0), half, strict=True):
        print(
            f"{name}: {mean:+.3f} [{mean - h:+.3f}, {mean + h:+.3f}] from scale 0 to 1"
        )
    print(
        f"mean ± standard deviation over {args.seeds} splits; the interval is paired, "
        f"95 %; splits overlap, which makes it narrower than it should be; on "
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    )
    folder = args.output / f"fair_diabetes-{now:%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True)
    packages = ("jaxgrl", "jax", "flax", "optax", "scikit-learn")
    results = {
        "command": shlex.join(sys.argv),
        "date": now.astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "layout": "values[scale][seed][measure]",
        "scales": SCALES,
        "measures": list(MEASURES),
        "values": values.tolist(),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    plot(values, folder / "fair_diabetes.png")
    print(f"Kept in {folder}")


if __name__ == "__main__":
    main()
