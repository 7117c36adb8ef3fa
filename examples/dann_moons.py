"""Domain-adversarial training (DANN) on two moons, seen as a moving decision boundary.

The source domain is scikit-learn's two moons with their labels. The target domain is
other moons, rotated and without labels. A classifier trained on the source alone
follows the source's moons and cuts through the target's. DANN makes the features of
both domains alike, which moves the boundary until it separates the target's moons too.

    python examples/dann_moons.py            # 3 methods x 10 seeds, a PNG and a GIF
    python examples/dann_moons.py --help

Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 17, 2016, section 5.1
https://jmlr.org/papers/v17/15-239.html
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from dann_digits import make_training
from flax import nnx
from support.pictures import animate_moons, draw_moons
from support.run import Run, make_parser, parse, print_methods
from support.training import train

import jaxgrl
from jaxgrl.nnx import DANN

POINTS = 300  # in each domain; three times as many score


# 1. The model: DANN puts the reversal layer between features and discriminator.
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
    """Returns source moons, and target and test moons rotated by the angle."""
    turn = np.radians(angle)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    random = np.random.RandomState(seed)
    data = {}
    for name, count in {"source": POINTS, "target": POINTS, "test": 3 * POINTS}.items():
        x, labels = sklearn.datasets.make_moons(count, noise=0.1, random_state=random)
        x = x - np.array([0.5, 0.25])  # rotated about the middle of the two moons
        data[name] = (x if name == "source" else x @ matrix).astype(np.float32)
        data[f"{name}_labels"] = labels
    return data


# 3. The training step is that of dann_digits.py.
def main():
    """Trains the three methods, saves what is finished, and shows it."""
    options = {"angle": 35.0, "seeds": 10, "steps": 4000}
    options |= {"scale": 1.0, "learning_rate": 0.01}
    args = parse(make_parser(__doc__, **options))
    splits = [make_data(args.angle, seed) for seed in range(args.seeds)]
    data = jax.tree.map(lambda *arrays: jnp.stack(arrays), *splits)
    # The ceiling is the same training with the target's points and labels as source.
    ceiling = data | {"source": data["target"], "source_labels": data["target_labels"]}
    methods = {"source only": (data, 0.0), "DANN": (data, args.scale)}
    methods |= {"trained on target": (ceiling, 0.0)}
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))
    rate = jaxgrl.dann_learning_rate(args.learning_rate, transition_steps=args.steps)
    training = make_training(make_model, optax.adam(rate), args.steps)
    history = {method: [] for method in methods}  # parameters after every chunk

    def chunks():
        for *chunk, state in train(*training, methods, keys, args.steps):
            history[chunk[0]].append(state[0])
            yield chunk

    with Run("dann_moons", args, methods={}) as run:
        run.follow(chunks(), len(methods) * args.steps, args.steps)
        # The seed whose DANN accuracy is the median (of two, the lower) is drawn.
        final = np.array(run.results["methods"]["DANN"]["target_accuracy"][-1])
        seed = int(np.argsort(final, kind="stable")[(len(final) - 1) // 2])
        run.results["drawn_seed"] = seed
    print_methods(run.results["methods"])
    if not args.no_plot:
        graphdef = nnx.graphdef(make_model(nnx.Rngs(0)))
        models = {
            method: [
                nnx.merge(graphdef, jax.tree.map(lambda p: p[seed], params))
                for params in states
            ]
            for method, states in history.items()
        }
        draw_moons(run, models, splits[seed])
        animate_moons(run, models["DANN"], splits[seed])
    run.print_where()


if __name__ == "__main__":
    main()
