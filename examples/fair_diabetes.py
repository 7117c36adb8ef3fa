"""Features that say less about a protected attribute, with the parts of a DANN.

scikit-learn's diabetes data: 442 patients, nine measurements and their sex, which is
no input, and the progression of the disease a year later. The network predicts the
progression. Its "domains" are the two sexes, so the reversed gradient removes from the
features what distinguishes them. The only other difference to adaptation is that every
patient has a label.

    python examples/fair_diabetes.py

For each scale, on 142 patients that no training has seen: R2 of the prediction, the
proxy A-distance of the sexes by their features (0: a linear classifier cannot tell
them apart), and the gap between the mean predictions for the two.

What it shows: features can lose part of what they say at no cost in R2. What it does
not: that a decision is fair. The sexes differ in blood values, a stronger classifier
may find what a linear one does not, 442 patients are few, and invariance is one notion
of fairness among several.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import sklearn.datasets
from flax import nnx
from support.pictures import draw_fairness
from support.run import Run, make_parser, parse

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


def main():
    """Trains every scale on every split at once, measures, saves and shows it."""
    parser = make_parser(__doc__, seeds=20, steps=1000)
    args = parse(parser, seeds=(lambda v: 2 <= v <= 1000, "between 2 and 1000"))
    x, y, sex = load()
    orders = [np.random.default_rng(s).permutation(len(y)) for s in range(args.seeds)]
    rows = np.stack(orders)
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))

    def one(scale, key, rows):
        whole = jnp.asarray(x), jnp.asarray(y), jnp.asarray(sex)
        return train(scale, key, rows, whole, args.steps)

    every = jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, None, None))
    facts = {"scales": SCALES, "measures": list(MEASURES)}
    layout = "values[scale][seed][measure]"
    with Run("fair_diabetes", args, layout=layout, **facts) as run:
        found = jax.jit(every)(jnp.array(SCALES), keys, rows[:, :TRAIN])
        features, predictions = map(np.asarray, found)
        values = np.array(
            [
                [
                    measure(features[i, s][t], predictions[i, s][t], y[t], sex[t])
                    for s, t in enumerate(rows[:, TRAIN:])
                ]
                for i in range(len(SCALES))
            ]
        )
        run.results["values"] = values.tolist()
    print(f"{'scale':>6}" + "".join(f"{name:>32}" for name in MEASURES))
    for scale, runs in zip(SCALES, values, strict=True):
        pairs = zip(runs.mean(axis=0), runs.std(axis=0, ddof=1), strict=True)
        cells = (f"{mean:.3f} ± {std:.3f}" for mean, std in pairs)
        print(f"{scale:6g}" + "".join(f"{cell:>32}" for cell in cells))
    change = values[SCALES.index(1.0)] - values[0]
    half = scipy.stats.t.ppf(0.975, args.seeds - 1) * scipy.stats.sem(change)
    for name, mean, h in zip(MEASURES, change.mean(axis=0), half, strict=True):
        print(
            f"{name}: {mean:+.3f} [{mean - h:+.3f}, {mean + h:+.3f}] from scale 0 to 1"
        )
    print(
        f"mean ± standard deviation over {args.seeds} splits; the interval is paired, "
        "95 %. The splits overlap, so it is narrower than it should be."
    )
    if not args.no_plot:
        draw_fairness(run, MEASURES, SCALES, values)
    run.print_where()


if __name__ == "__main__":
    main()
