"""Domain-adversarial training (DANN) from upright to rotated digits, in Flax NNX.

The source domain is scikit-learn's handwritten digits with their labels. The target
domain is other images of the same kind, rotated and without labels. A classifier that
is trained on the source alone loses half of its accuracy on the target. DANN trains a
domain discriminator on the features. A gradient reversal layer in front of the
discriminator trains the features to make the two domains indistinguishable, so one
classifier serves both.

    python examples/dann_digits.py            # 3 methods x 5 seeds
    python examples/dann_digits.py --help

Ganin and Lempitsky, Unsupervised Domain Adaptation by Backpropagation, ICML 2015,
https://proceedings.mlr.press/v37/ganin15.html
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.ndimage
import sklearn.datasets
from flax import nnx
from support.pictures import draw_digits
from support.run import Run, make_parser, parse, print_methods
from support.training import train

import jaxgrl
from jaxgrl.nnx import DANN

BATCH = 64  # examples from each domain


# 1. The model. DANN puts the reversal layer between features and discriminator.
def make_model(rngs):
    """Returns a DANN for images of 64 pixels: 10 label logits and 1 domain logit."""
    return DANN(
        feature_extractor=nnx.Sequential(nnx.Linear(64, 100, rngs=rngs), nnx.relu),
        label_classifier=nnx.Linear(100, 10, rngs=rngs),
        domain_discriminator=nnx.Sequential(
            nnx.Linear(100, 100, rngs=rngs), nnx.relu, nnx.Linear(100, 1, rngs=rngs)
        ),
    )


# 2. The loss. Both terms are minimised, so they are added. The layer reverses the
#    gradient and holds the scale: a weight on the domain loss would apply it twice.
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


# 4. The training step, a pure function, so that lax.scan and vmap can take it.
def make_training(make_model, optimizer, steps):
    """Returns three functions: the start of one seed, a step of it, its evaluation."""
    graphdef = nnx.graphdef(make_model(nnx.Rngs(0)))

    def init(key):
        params = nnx.state(make_model(nnx.Rngs(key)))
        return params, optimizer.init(params)

    def train_step(state, step, data, key, scale):
        params, opt_state = state
        # From 0 to scale over the training: at first the discriminator knows nothing.
        schedule = jaxgrl.dann_schedule(steps, end_value=scale)
        source_key, target_key = jax.random.split(jax.random.fold_in(key, step))
        s = jax.random.randint(source_key, (BATCH,), 0, len(data["source"]))
        t = jax.random.randint(target_key, (BATCH,), 0, len(data["target"]))
        batch = data["source"][s], data["source_labels"][s], data["target"][t]

        def loss(params):
            return loss_fn(nnx.merge(graphdef, params), *batch, schedule(step))

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), metrics

    def evaluate(state, data):
        model = nnx.merge(graphdef, state[0])
        predictions = jnp.argmax(model(data["test"]).label_logits, axis=-1)
        return {"target_accuracy": jnp.mean(predictions == data["test_labels"])}

    return init, train_step, evaluate


def main():
    """Trains the three methods, saves what is finished, and shows it."""
    options = {"angle": 25.0, "seeds": 5, "steps": 4000}
    options |= {"scale": 1.0, "learning_rate": 0.01}
    args = parse(make_parser(__doc__, **options))
    splits = [make_data(args.angle, seed) for seed in range(args.seeds)]
    data = jax.tree.map(lambda *arrays: jnp.stack(arrays), *splits)
    # The ceiling is the same training with the target's images and labels as source.
    ceiling = data | {"source": data["target"], "source_labels": data["target_labels"]}
    methods = {"source only": (data, 0.0), "DANN": (data, args.scale)}
    methods |= {"trained on target": (ceiling, 0.0)}
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))
    rate = jaxgrl.dann_learning_rate(args.learning_rate, transition_steps=args.steps)
    training = make_training(make_model, optax.sgd(rate, momentum=0.9), args.steps)
    features = {}

    def chunks():
        for *chunk, state in train(*training, methods, keys, args.steps):
            method, step, *_ = chunk
            if step == args.steps:
                first = jax.tree.map(lambda p: p[0], state[0])
                model = make_model(nnx.Rngs(0))
                nnx.update(model, first)
                domains = splits[0]["source"], splits[0]["test"]
                features[method] = [model.feature_extractor(x) for x in domains]
            yield chunk

    with Run("dann_digits", args, methods={}) as run:
        run.follow(chunks(), len(methods) * args.steps, args.steps)
    print_methods(run.results["methods"])
    if not args.no_plot:
        labels = [splits[0]["source_labels"], splits[0]["test_labels"]]
        draw_digits(run, features, labels)
    run.print_where()


if __name__ == "__main__":
    main()
