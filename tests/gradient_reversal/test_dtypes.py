"""The gradient has the dtype of x, rounded once, whatever the dtype of the scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrl import gradient_reversal

FLOATS = (
    *("float32", "float16", "bfloat16", "complex64"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn"),
)
SCALE_DTYPES = ("float32", "bfloat16", "float16", "int32", "bool", "uint8")


@pytest.mark.parametrize("scale_dtype", [None, *SCALE_DTYPES])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_gradient_has_the_dtype_of_x(dtype, scale_dtype):
    values = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    x = jnp.asarray(values).astype(dtype)
    scale = 1.0 if scale_dtype is None else jnp.ones((), scale_dtype)
    y, pull = jax.vjp(gradient_reversal, x, scale)
    x_ct, _ = pull(x)
    assert y.dtype == x_ct.dtype == x.dtype
    expected = jnp.asarray(-values).astype(dtype)
    assert (x_ct.astype(jnp.complex64) == expected.astype(jnp.complex64)).all()
    per_example = jnp.ones(4, jnp.float32) * 0.5
    (x_ct,) = jax.vjp(lambda x: gradient_reversal(x, per_example), x)[1](x)
    assert x_ct.dtype == x.dtype


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_double_precision(dtype):
    with jax.enable_x64(True):
        x = jnp.array([1.0, 1 / 3], dtype)
        for scale in (0.1, jnp.array(0.1, jnp.float64)):
            (x_ct,) = jax.vjp(lambda x, s=scale: gradient_reversal(x, s), x)[1](x)
            assert x_ct.dtype == x.dtype
            np.testing.assert_allclose(x_ct, -0.1 * np.asarray(x), rtol=1e-15)


def test_a_float64_scale_is_not_rounded_before_it_is_multiplied():
    with jax.enable_x64(True):
        ct = np.random.default_rng(0).normal(size=1000).astype(np.float32)
        scale = np.array(np.pi)
        (x_ct,) = jax.vjp(lambda x: gradient_reversal(x, scale), ct)[1](ct)
        np.testing.assert_array_equal(x_ct, (-np.pi * ct.astype(float)).astype("f4"))
        assert (x_ct != -np.float32(np.pi) * ct).any()


def test_a_python_number_does_not_widen_the_product():
    with jax.enable_x64(True):
        x = jnp.ones(3, jnp.float32)
        f = jax.grad(lambda x: jnp.sum(gradient_reversal(x, 0.1) ** 2))
        assert "f64[3]" not in str(jax.make_jaxpr(f)(x))
        f = jax.grad(lambda x: jnp.sum(gradient_reversal(x, np.array(0.1)) ** 2))
        assert "f64[3]" in str(jax.make_jaxpr(f)(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["python", "traced", "per example"])
def test_low_precision_is_rounded_once_and_unbiased(dtype, kind):
    rng = np.random.default_rng(0)
    ct = jnp.asarray(rng.uniform(1, 2, 100_000).astype(np.float32)).astype(dtype)
    scale = {"python": 0.3, "traced": jnp.float32(0.3)}.get(kind)
    if scale is None:
        scale = jnp.full(ct.shape, 0.3, jnp.float32)
    (x_ct,) = jax.jit(lambda x, s: jax.vjp(gradient_reversal, x, s)[1](ct)[:1])(
        ct, scale
    )
    exact = -np.float32(0.3) * np.asarray(ct, np.float32)
    assert x_ct.dtype == ct.dtype
    np.testing.assert_array_equal(x_ct, jnp.asarray(exact).astype(dtype))
    bias = np.mean(np.asarray(x_ct, np.float64) / exact) - 1
    assert abs(bias) < 2e-5  # a bfloat16 scale would be off by 2.6e-3


def test_features_that_feed_another_head_too():
    x = jnp.ones(3, jnp.bfloat16)

    def loss(x, scale):
        return jnp.sum(x * x) + jnp.sum(gradient_reversal(x, scale))

    grad = jax.grad(loss)(x, jnp.float32(0.5))
    assert grad.dtype == jnp.bfloat16 and (grad == 1.5).all()


def test_complex_gradients_keep_their_infinities():
    ct = jnp.array([complex(np.inf, 1.0)], jnp.complex64)
    (x_ct,) = jax.vjp(lambda x: gradient_reversal(x, 2.0), ct)[1](ct)
    assert x_ct[0].real == -np.inf and x_ct[0].imag == -2.0


def test_a_float_without_a_sign_is_refused():
    x = jnp.ones(3, jnp.float8_e8m0fnu)
    for call in (gradient_reversal, jax.jit(gradient_reversal)):
        with pytest.raises(TypeError, match=r"`x` must .*float8_e8m0fnu.*no sign"):
            call(x, 0.5)


def test_a_mutable_reference_is_refused():
    ref = jax.new_ref(jnp.ones(3))
    with pytest.raises(TypeError, match=r"`x` must not hold a mutable .*`x\[\.\.\.\]`"):
        gradient_reversal(ref, 0.5)
