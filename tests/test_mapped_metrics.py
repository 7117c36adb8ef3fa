"""Domain weights, loss and accuracy of a batch that is split over devices.

Each way to split it must give the value and the gradient of one device that has it all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxgrl import domain_accuracy, domain_loss, domain_weights, entropy_weights

pytestmark = pytest.mark.slow

DEVICES = 8


def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("i",), axis_types=(kind,))


def _shard_map(check_vma):
    def split(f, *, replicated, out):
        """Maps ``f`` over the rows; its first argument goes to all devices."""

        def call(*args):
            specs = (P(), *[P("i")] * (len(args) - 1)) if replicated else P("i")
            return jax.shard_map(
                f, mesh=_mesh(), in_specs=specs, out_specs=out, check_vma=check_vma
            )(*args)

        return call

    return split


def _by_device(mapped):
    def split(f, *, replicated, out):
        def call(*args):
            in_axes = tuple(
                None if replicated and not n else 0 for n in range(len(args))
            )
            rows = [
                a if axis is None else a.reshape(DEVICES, -1, *a.shape[1:])
                for a, axis in zip(args, in_axes, strict=True)
            ]
            result = mapped(f, in_axes=in_axes, axis_name="i")(*rows)
            # What P() promises is one value: that of any device.
            return jax.tree.map(
                lambda a: a[0] if out == P() else a.reshape(-1, *a.shape[2:]), result
            )

        return call

    return split


SPLITS = {
    "shard_map, check_vma": _shard_map(True),
    "shard_map": _shard_map(False),
    "vmap": _by_device(jax.vmap),
}
if hasattr(jax, "pmap"):
    SPLITS["pmap"] = _by_device(jax.pmap)


def _jit(split, function):
    return function if split == "pmap" else jax.jit(function)  # which compiles itself


def _case(name):
    """Returns x, domains, where and keywords of 64 rows, sorted by their domains."""
    rng = np.random.default_rng(0)
    k = 3 if "three" in name else 2
    domains = np.array([0] * 9 + [1] * 55)  # six devices have no source
    if k == 3:
        domains = np.array([0] * 5 + [2] * 59)  # and none has domain 1
    where = rng.uniform(size=64) > (0.4 if "masked" in name else -1)
    if "masked" in name:
        where[16:24] = False  # one device counts nothing
    if "nothing" in name:
        where[:] = False
    if "sequence" in name:
        return rng.normal(size=(64, 4, 3)), domains[:, None], where[:, None], k
    return rng.normal(size=(64, 3)), domains, where, k


CASES = ["two", "two, masked", "three", "three, masked", "sequence, masked", "nothing"]


def _loss_and_accuracy(w, x, domains, where, k, axis_name=None):
    logits = x @ w if k == 3 else (x @ w)[..., 0]
    kwargs = {"num_domains": k, "where": where, "axis_name": axis_name}
    weights = entropy_weights(jnp.stack([x[..., 0], x[..., 1]], -1), domains, **kwargs)
    loss = domain_loss(logits, domains, weights=weights, **kwargs)
    return loss, (
        domain_loss(logits, domains, **kwargs),
        domain_accuracy(logits, domains, **kwargs),
    )


def _given(name):
    x, domains, where, k = _case(name)
    w = np.random.default_rng(1).normal(size=(3, 3))
    return (w.astype(np.float32), x.astype(np.float32), domains, where), k


def _assert_close(actual, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7),
        actual,
        expected,
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_the_mean_over_devices_is_the_whole_batch(split, name):
    args, k = _given(name)
    whole = jax.jit(functools.partial(_loss_and_accuracy, k=k))
    expected, grad = jax.value_and_grad(whole, has_aux=True)(*args)
    local = functools.partial(_loss_and_accuracy, k=k, axis_name="i")

    # Differentiated inside, as a training step does it.
    def step(*args):
        def loss(w):
            value, aux = local(w, *args[1:])
            return lax.pmean(value, "i"), aux

        return lax.pmean(jax.value_and_grad(loss, has_aux=True)(args[0]), "i")

    inside = SPLITS[split](step, replicated=True, out=P())
    _assert_close(_jit(split, inside)(*args), (expected, grad))

    # Differentiated outside, through the mean of what the devices return.
    def mean(*args):
        f = SPLITS[split](
            lambda *args: jax.tree.map(lambda a: a[None], local(*args)),
            replicated=True,
            out=P("i"),
        )
        return jax.tree.map(jnp.mean, f(*args))

    outside = _jit(split, jax.value_and_grad(mean, has_aux=True))
    _assert_close(outside(*args), (expected, grad))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_weights_are_those_of_the_whole_batch(split, name):
    (_, x, domains, where), k = _given(name)

    def weights(x, domains, where, axis_name=None):
        kwargs = {"num_domains": k, "where": where, "axis_name": axis_name}
        return (
            domain_weights(domains, **kwargs),
            entropy_weights(x, domains, **kwargs),
            entropy_weights(x, where=where, axis_name=axis_name),
        )

    expected = jax.jit(weights)(x, domains, where)
    local = functools.partial(weights, axis_name="i")
    f = SPLITS[split](local, replicated=False, out=P("i"))
    _assert_close(_jit(split, f)(x, domains, where), expected)


@pytest.mark.parametrize("split", SPLITS)
def test_nine_source_rows_of_64_on_eight_devices(split):
    # Logits at which the loss is 0.337 and 45 % of the gradient is the source's.
    wrong = np.where(np.arange(64) < 9, 0.2570, 0.3141)
    domains = (np.arange(64) >= 9).astype(np.int32)
    logits = np.log(wrong / (1 - wrong)) * np.where(domains == 1, -1, 1)
    logits = logits.astype(np.float32)

    def mean(logits, axis_name):
        def local(logits, domains):
            return domain_loss(logits, domains, axis_name=axis_name)[None]

        f = SPLITS[split](local, replicated=False, out=P("i"))
        return jnp.mean(f(logits, domains))

    def measured(axis_name):
        loss = functools.partial(mean, axis_name=axis_name)
        loss, grad = _jit(split, jax.value_and_grad(loss))(logits)
        return float(loss), float(abs(grad[:9]).sum() / abs(grad).sum())

    assert measured("i") == pytest.approx((0.337, 0.45), abs=5e-4)
    loss, share = measured(None)  # each device balances its own rows: not the same
    assert loss > 0.35 and share < 0.2


def test_single_rows_under_vmap():
    (_, x, domains, where), _ = _given("two, masked")

    @jax.jit
    def whole(x, domains, where):
        return (
            entropy_weights(x, domains, where=where),
            domain_weights(domains, where=where),
            domain_loss(x[:, 0], domains, where=where),
            domain_accuracy(x[:, 0], domains, where=where),
        )

    def row(x, domain, where):
        given = {"where": where, "axis_name": "rows"}
        return (
            entropy_weights(x, domain, **given),
            domain_weights(domain, **given),
            domain_loss(x[0], domain, **given),
            domain_accuracy(x[:1], domain, **given),
        )

    rows = jax.jit(jax.vmap(row, axis_name="rows"))(x, domains, where)
    *weights, loss, accuracy = whole(x, domains, where)
    np.testing.assert_allclose(rows[0], weights[0], rtol=1e-5)
    np.testing.assert_allclose(rows[1], weights[1], rtol=1e-6)
    np.testing.assert_allclose(rows[2].mean(), loss, rtol=1e-5)
    np.testing.assert_allclose(rows[3].mean(), accuracy, rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_several_axes_at_once(check_vma):
    """A mesh of 4 by 2 and, where JAX can, a vmap over micro-batches on each device."""
    (w, x, domains, where), k = _given("three, masked")
    whole = jax.jit(functools.partial(_loss_and_accuracy, k=k))
    expected = whole(w, x, domains, where)
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    axis_name = ("i", "j") if check_vma else ("i", "j", "half")

    def local(*args):
        f = functools.partial(_loss_and_accuracy, w, k=k, axis_name=axis_name)
        if not check_vma:  # JAX has no psum over a vmap's axis under check_vma
            args = [a.reshape(2, -1, *a.shape[1:]) for a in args]
            f = jax.vmap(f, axis_name="half")
        return jax.tree.map(lambda a: lax.pmean(jnp.mean(a), ("i", "j")), f(*args))

    f = jax.shard_map(
        local, mesh=mesh, in_specs=P(("i", "j")), out_specs=P(), check_vma=check_vma
    )
    _assert_close(jax.jit(f)(x, domains, where), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_positions_split_over_an_axis_that_the_domains_do_not_vary_over(check_vma):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 6)).astype(np.float32)
    domains = np.array([0, 0, 0, 0, 0, 0, 0, 1])[:, None]
    expected = domain_loss(logits, domains), domain_accuracy(logits, domains)
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(AxisType.Auto,) * 2)

    def local(*args):
        functions = domain_loss, domain_accuracy
        found = [f(*args, axis_name=("i", "j")) for f in functions]
        return lax.pmean(jnp.stack(found), ("i", "j"))

    f = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("i", "j"), P("i")),
        out_specs=P(),
        check_vma=check_vma,
    )
    np.testing.assert_allclose(jax.jit(f)(logits, domains), expected, rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_domains_that_are_the_same_on_every_device(check_vma):
    """Made inside, they vary over no axis, and yet each device has rows of its own."""
    logits = _given("two")[0][1][:, 0]
    domains = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    expected = domain_loss(logits, np.tile(domains, DEVICES))

    def local(logits):
        own = jnp.repeat(jnp.arange(2), jnp.array([3, 5]), total_repeat_length=8)
        losses = [domain_loss(logits, d, axis_name="i") for d in (own, domains)]
        return lax.pmean(jnp.stack(losses), "i")

    f = jax.shard_map(
        local, mesh=_mesh(), in_specs=P("i"), out_specs=P(), check_vma=check_vma
    )
    np.testing.assert_allclose(jax.jit(f)(logits), [expected] * 2, rtol=1e-5)


@pytest.mark.parametrize(
    "jit, name", [*((True, name) for name in CASES), (False, "sequence, masked")]
)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_sharded_batch_needs_no_axis_name(kind, jit, name):
    args, k = _given(name)
    if name == "nothing":
        where = args[-1]
        args = (*args[:-1], np.asarray(where))
    grad = jax.value_and_grad(functools.partial(_loss_and_accuracy, k=k), has_aux=True)
    expected = jax.jit(grad)(*args)
    with jax.set_mesh(_mesh(getattr(AxisType, kind))):
        w, *rows = (jax.device_put(a, P("i") if n else P()) for n, a in enumerate(args))
        actual = (jax.jit(grad) if jit else grad)(w, *rows)
        _assert_close(jax.device_get(actual), jax.device_get(expected))


@pytest.mark.parametrize(
    "jit, spec", [(True, P("i")), (True, P(None, "i")), (True, P()), (False, P("i"))]
)
def test_a_map_on_an_explicit_mesh(spec, jit):
    """The domains of the images are broadcast to pixels that are sharded otherwise."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 8, 3)).astype(np.float32)
    domains = np.array([0, 0, 0, 0, 0, 0, 1, 1])[:, None, None]
    where = rng.uniform(size=logits.shape) > 0.3
    grad = jax.value_and_grad(domain_loss)
    expected = jax.jit(grad)(logits, domains, where=where)
    accuracy = jax.jit(domain_accuracy)(logits, domains, where=where)
    plain = jax.jit(domain_loss)(logits, domains)
    with jax.set_mesh(_mesh(AxisType.Explicit)):
        z, mask = jax.device_put(logits, spec), jax.device_put(where, spec)
        for domains_spec in (P(), P("i")) if spec == P("i") else (P(),):
            d = jax.device_put(domains, domains_spec)
            actual = (jax.jit(grad) if jit else grad)(z, d, where=mask)
            assert jax.typeof(actual[1]) == jax.typeof(z)
            _assert_close(jax.device_get(actual), jax.device_get(expected))
            f = jax.jit(domain_accuracy) if jit else domain_accuracy
            np.testing.assert_allclose(f(z, d, where=mask), accuracy, rtol=1e-5)
            unmasked = jax.jit(domain_loss) if jit else domain_loss
            np.testing.assert_allclose(unmasked(z, d), plain, rtol=1e-5)
