"""The three ways to write the layer, for tests that hold for each of them."""

import numpy as np

import jaxgrl.linen
import jaxgrl.nnx
from jaxgrl import gradient_reversal


def _nnx_layer(x, scale):
    return jaxgrl.nnx.GradientReversal()(x, scale)


def _linen_layer(x, scale):
    return jaxgrl.linen.GradientReversal().apply({}, x, scale)


SPELLINGS = {
    "function": gradient_reversal,
    "nnx": _nnx_layer,
    "linen": _linen_layer,
}


def identity(x, scale):
    """The oracle: ordinary autodiff of the function without the layer."""
    del scale
    return x


def assert_close(actual, expected):
    """Compares values and dtypes."""
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-7)
    assert actual.dtype == expected.dtype
