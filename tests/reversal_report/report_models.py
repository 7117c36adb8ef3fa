"""A small DANN with places to change it at, for the tests of reversal_report."""

import jax
import jax.numpy as jnp

from jaxgrl import domain_loss, gradient_reversal

BATCH = 24
X = jax.random.normal(jax.random.key(0), (2 * BATCH, 5), jnp.float32)
Y = jnp.argmax(X[:BATCH, :3], axis=1)
DOMAINS = jnp.repeat(jnp.array([0, 1]), BATCH)


def label_loss(logits):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), Y[:, None], axis=1)
    return -jnp.mean(picked)


def dense(params, x):
    return x @ params["kernel"] + params["bias"][None]


def make_params(dtype=jnp.float32, outputs=1, width=8):
    sizes = {
        "features": (5, 8),
        "classifier": (8, 3),
        "hidden": (width, 8),
        "out": (8, outputs),
    }
    keys = jax.random.split(jax.random.key(1), len(sizes))
    return {
        name: {
            "kernel": (
                jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5
            ).astype(dtype),
            "bias": jnp.full(shape[1], 0.1, dtype),
        }
        for key, (name, shape) in zip(keys, sizes.items(), strict=True)
    }


@jax.custom_vjp
def of_a_tree(tree, scale):
    """Reverses a tree, by hand."""
    return tree


of_a_tree.defvjp(
    lambda t, s: (t, s), lambda s, g: (jax.tree.map(lambda a: -s * a, g), None)
)


def encode(params, scale):
    """Returns the features."""
    del scale
    return jax.nn.tanh(dense(params["features"], X))


def classify(params, features, scale):
    """Returns the label logits."""
    del scale
    return dense(params["classifier"], features[:BATCH])


def hide(params, features, scale):
    """Returns the hidden layer of the discriminator."""
    del scale
    return jax.nn.relu(dense(params["hidden"], features))


def discriminate(params, hidden, scale):
    """Returns the domain logits."""
    del scale
    return dense(params["out"], hidden)


def dann(**parts):
    """Returns a DANN as a loss, right but for the parts that are given."""
    encoder = parts.get("encode", encode)
    layer = parts.get("layer", gradient_reversal)
    classifier = parts.get("classify", classify)
    hidden_part = parts.get("hide", hide)
    last = parts.get("discriminate", discriminate)
    domain_part = parts.get(
        "domain_loss", lambda logits, s: domain_loss(logits, DOMAINS)
    )
    label_part = parts.get("label_loss", lambda logits, s: label_loss(logits))

    def loss(params, scale):
        features = encoder(params, scale)
        label = label_part(classifier(params, features, scale), scale)
        hidden = hidden_part(params, layer(features, scale), scale)
        logits = last(params, hidden, scale)
        return label, domain_part(logits, scale), logits

    return loss


def total(loss):
    """Returns the same loss as the sum of its two terms."""

    def summed(params, scale, *args):
        label, domain, _ = loss(params, scale, *args)
        return label + domain.astype(label.dtype)

    return summed
