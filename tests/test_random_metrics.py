r"""The domain metrics on random batches, against a few lines of NumPy each.

Shapes, domains, masks, weights, dtypes and the split over devices are drawn. A masked
row holds garbage. The suite runs the same cases each time. Run others with

    JAXGRL_EXAMPLES=2000 JAX_ENABLE_COMPILATION_CACHE=false \
        python -m pytest tests/test_random_metrics.py --hypothesis-seed=1
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from random_cases import cases

from jaxgrl import domain_accuracy, domain_loss, domain_weights, entropy_weights

pytestmark = pytest.mark.slow


class Batch(NamedTuple):
    """A batch, and the shape of its rows; None where an argument is left out."""

    num_domains: int
    rows: tuple
    logits: Any
    domains: Any
    where: Any
    weights: Any
    label_logits: Any
    activation: Any

    def flat(self, name):
        """Returns one value for each row, or an axis of classes for each."""
        value = getattr(self, name)
        value = np.asarray(value, None if value.dtype.kind in "biu" else np.float64)
        classes = value.shape[len(self.rows) :]
        return np.broadcast_to(value, self.rows + classes).reshape(-1, *classes)

    def members(self):
        """Returns the rows that count of each domain, without empty domains."""
        counts = self.flat("where") if self.where is not None else True
        own = [self.flat("domains") == d for d in range(self.num_domains)]
        found = [np.flatnonzero(o & counts) for o in own]
        return [(d, rows) for d, rows in enumerate(found) if rows.size]


def _domain_weights(batch):
    weights = np.zeros(int(np.prod(batch.rows)))
    for _, rows in batch.members():
        weights[rows] = 1 / len(rows) / len(batch.members())
    return weights.reshape(batch.rows)


def _logits_of_domains(batch):
    z = batch.flat("logits")
    z = z if z.ndim == 2 else z[:, None]
    return np.hstack([0 * z, z]) if z.shape[1] == 1 else z


def _softmax(z):
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def _domain_loss(batch):
    z, losses = _logits_of_domains(batch), []
    for d, rows in batch.members():
        weight = 1 if batch.weights is None else batch.flat("weights")[rows]
        losses.append(np.mean(-weight * np.log(_softmax(z[rows])[:, d])))
    return np.mean(losses) if losses else 0.0


def _gradient(batch):
    z = _logits_of_domains(batch)
    gradient = np.zeros_like(z)
    for d, rows in batch.members():
        error = _softmax(z[rows]) - np.eye(z.shape[1])[d]
        if batch.weights is not None:
            error *= batch.flat("weights")[rows, None]
        gradient[rows] = error / len(rows) / len(batch.members())
    own = gradient if batch.logits.size == z.size else gradient[:, 1]
    return own.reshape(batch.logits.shape)


def _domain_accuracy(batch):
    z, shares = _logits_of_domains(batch), []
    for d, rows in batch.members():
        shares.append(np.mean(z[rows].argmax(axis=1) == d))
    return np.mean(shares) if shares else np.nan


def _entropy_weights(batch):
    z = batch.flat("label_logits")
    if batch.activation is jax.nn.sigmoid:
        z = np.stack([0 * z, z], axis=-1)
    p = _softmax(z)
    entropy = -np.sum(p * np.log(p), axis=tuple(range(1, z.ndim)))
    weights = np.zeros(len(z))
    for _, rows in batch.members():
        values = 1 + np.exp(-entropy[rows])
        weights[rows] = values / values.mean()
    return weights.reshape(batch.rows)


ARRAYS = ("logits", "domains", "where", "weights", "label_logits")


def _measure(batch, axis_name=None):
    """Returns what jaxgrl finds."""
    given = {"num_domains": batch.num_domains, "axis_name": axis_name}
    given["where"] = batch.where
    args = batch.logits, batch.domains
    found = {
        "loss": domain_loss(*args, weights=batch.weights, **given),
        "accuracy": domain_accuracy(*args, **given),
        "weights": domain_weights(batch.domains, **given),
    }
    if batch.label_logits is not None:
        given["activation"] = batch.activation
        weights = entropy_weights(batch.label_logits, batch.domains, **given)
        found["entropy weights"] = weights
    return found


# How a batch is split. Each returns a list of what the parts find, as an axis.


def _one_device(local, arrays):
    return jax.tree.map(lambda a: a[None], local(arrays, None))


def _vmap(local, arrays):
    parts = {k: jnp.stack(jnp.split(a, 2)) for k, a in arrays.items()}
    return jax.vmap(lambda arrays: local(arrays, "i"), axis_name="i")(parts)


def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("i",), axis_types=(kind,), devices=jax.devices()[:2])


def _shard_map(check_vma):
    def split(local, arrays):
        return jax.shard_map(
            lambda arrays: jax.tree.map(lambda a: a[None], local(arrays, "i")),
            mesh=_mesh(),
            in_specs=P("i"),
            out_specs=P("i"),
            check_vma=check_vma,
        )(arrays)

    return split


SPLITS = {"vmap": _vmap, "vma": _shard_map(True), "no vma": _shard_map(False)}


def _found(batch, split):
    """Returns what the parts find together, and the gradient of their mean loss."""

    def local(arrays, axis_name):
        return _measure(batch._replace(**arrays), axis_name)

    def loss(logits, others):
        parts = split(local, {"logits": logits, **others})
        found = {k: jnp.mean(parts[k]) for k in ("loss", "accuracy")}
        for name in set(parts) - set(found):
            several = parts[name].shape[0] > 1
            found[name] = jnp.concatenate(parts[name]) if several else parts[name][0]
        return found["loss"], found

    def both(logits, others):
        (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(logits, others)
        return found | {"gradient": gradient}

    arrays = {k: getattr(batch, k) for k in ARRAYS if getattr(batch, k) is not None}
    return jax.jit(both)(arrays.pop("logits"), arrays)


def _assert_right(batch, found):
    shapes = [a.shape for a in (batch.domains, batch.where) if a is not None]
    own = batch._replace(rows=np.broadcast_shapes(*shapes))
    expected = {
        "loss": np.asarray(_domain_loss(batch)),
        "gradient": _gradient(batch),
        "accuracy": np.asarray(_domain_accuracy(batch)),
        "weights": _domain_weights(own),
    }
    if batch.label_logits is not None:
        expected["entropy weights"] = _entropy_weights(batch)
    for name, value in expected.items():
        low = name == "gradient" and batch.logits.dtype != np.float32
        tolerance = (
            {"rtol": 1e-2, "atol": 1e-4} if low else {"rtol": 3e-5, "atol": 1e-6}
        )
        actual = np.asarray(found[name], np.float64).reshape(value.shape)
        np.testing.assert_allclose(actual, value, **tolerance, err_msg=name)


@st.composite
def _batches(draw, parts=1):
    """Draws a batch; of several parts, its first axis is theirs."""

    def one(*options):
        return draw(st.sampled_from(options))

    k, rng = one(2, 2, 3, 4), np.random.default_rng(draw(st.integers(0, 999)))
    rows = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if parts > 1:
        rows = (parts * draw(st.integers(0, 3)), *rows[1:])

    def partly():
        kept = 1 if parts > 1 else 0
        return rows[:kept] + tuple(one(n, n, 1) for n in rows[kept:])

    per_row = k == 2 and draw(st.booleans())
    classes = () if per_row else (one(1, 2) if k == 2 else k,)
    logits = np.array(3 * rng.normal(size=rows + classes))
    shape = partly()
    if per_row and rows[-1:] == (2,):
        shape = (*shape[:-1], 2)  # beside 1, they could be two classes
    kinds = ("int32", "int8", "uint8") + ("bool",) * (k == 2)
    present = one(1, k, k)  # of the other domains there are no rows
    domains = np.array(rng.integers(present, size=shape), one(*kinds))
    mask, weights, labels, activation = None, None, None, None
    if draw(st.booleans()):
        mask = np.array(rng.uniform(size=partly()) < one(0, 0.3, 0.8))
    if draw(st.booleans()):
        weights = np.array(rng.uniform(size=partly()), np.float32)
    if rows and draw(st.booleans()):
        activation = one(jax.nn.softmax, jax.nn.sigmoid)
        classes = one(1, 2, 3) + (activation is jax.nn.softmax)
        labels = rng.normal(size=(*rows, classes)).astype("float32")
    if mask is not None:
        masked = np.broadcast_to(~mask, rows)
        logits[masked] = np.nan
        for given in (labels, weights, domains):
            if given is not None and given.shape[: len(rows)] == rows:
                given[masked] = np.nan if given.dtype.kind == "f" else 99
    logits = jnp.asarray(logits, one("float32", "bfloat16", "float16"))
    return Batch(k, rows, logits, domains, mask, weights, labels, activation)


@cases(40)
@given(_batches())
def test_random_batches(batch):
    _assert_right(batch, _found(batch, _one_device))


@cases(40)
@given(_batches(parts=2), st.sampled_from(list(SPLITS)))
def test_random_batches_that_are_split(batch, split):
    if not batch.logits.size:
        split = "vmap"  # XLA compiles no shard_map of empty arrays alone
    _assert_right(batch, _found(batch, SPLITS[split]))


@cases(30)
@given(_batches(parts=2), st.sampled_from([AxisType.Auto, AxisType.Explicit]))
def test_random_batches_on_a_mesh(batch, kind):
    mesh = _mesh(kind)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("i"))
        placed = {
            k: jax.device_put(getattr(batch, k), rows)
            for k in ARRAYS
            if getattr(batch, k) is not None
        }
        found = jax.device_get(_found(batch._replace(**placed), _one_device))
    _assert_right(batch, found)


@cases(20)
@given(_batches(), st.integers(0, 999), st.sampled_from([-1, 9]))
def test_a_domain_out_of_range(batch, at, wrong):
    if batch.domains.dtype != np.int32 or not batch.domains.size:
        batch = batch._replace(
            rows=(2,),
            logits=jnp.zeros((2, batch.num_domains), jnp.float32),
            domains=np.zeros(2, np.int32),
            label_logits=None,
        )
    batch = batch._replace(where=None, weights=None)
    batch.domains.flat[at % batch.domains.size] = wrong
    with pytest.raises(ValueError, match="`domains`"):
        _measure(batch)
    if batch.logits.size:
        found = _found(batch._replace(label_logits=None), _one_device)
        assert np.isnan(found["loss"]) and np.isnan(found["accuracy"])
        assert np.isnan(found["weights"]).any()
