"""CDAN on data: digits, and the same rotated by 15 degrees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
import sklearn.datasets
from flax import nnx

from jaxgrl import domain_loss, multilinear_map
from jaxgrl.nnx import DANN

pytestmark = pytest.mark.slow
STEPS, BATCH, WIDTH = 1500, 32, 32


def make_data():
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = np.float32(images / 16).reshape(-1, 8, 8)
    turned = scipy.ndimage.rotate(images, 15, (2, 1), reshape=False, order=1)
    source, target = images[:900].reshape(-1, 64), turned[900:].reshape(-1, 64)
    return tuple(map(jnp.asarray, (source, labels[:900], target, labels[900:])))


def target_accuracy(scale, key, data):
    source, labels, target, target_labels = data
    rngs = nnx.Rngs(key)
    model = DANN(
        nnx.Sequential(nnx.Linear(64, WIDTH, rngs=rngs), nnx.relu),
        nnx.Linear(WIDTH, 10, rngs=rngs),
        nnx.Sequential(
            nnx.Linear(WIDTH * 10, WIDTH, rngs=rngs),
            nnx.relu,
            nnx.Linear(WIDTH, 1, rngs=rngs),
        ),
        condition=multilinear_map,
    )
    graphdef, params = nnx.split(model)

    def step(params, index):
        keys = jax.random.split(jax.random.fold_in(key, index))
        s = jax.random.randint(keys[0], (BATCH,), 0, len(source))
        t = jax.random.randint(keys[1], (BATCH,), 0, len(target))

        def loss(params):
            x = jnp.concatenate([source[s], target[t]])
            label_logits, domain_logits = nnx.merge(graphdef, params)(x, scale)
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            domains = jnp.repeat(jnp.array([0, 1]), BATCH)
            label_loss = cross_entropy(label_logits[:BATCH], labels[s]).mean()
            return label_loss + domain_loss(domain_logits, domains)

        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

    params, _ = jax.lax.scan(step, params, jnp.arange(STEPS))
    logits = nnx.merge(graphdef, params)(target).label_logits
    return jnp.mean(jnp.argmax(logits, axis=1) == target_labels)


def test_cdan_is_above_source_only():
    data, keys = make_data(), jax.vmap(jax.random.key)(jnp.arange(4))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def accuracies(scale, key):
        return target_accuracy(scale, key, data)

    gained = accuracies(jnp.float32(1), keys) - accuracies(jnp.float32(0), keys)
    assert gained.mean() > 0.1, gained
