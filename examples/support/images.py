"""USPS and MNIST at 16 x 16: the file, the augmentation, and the network."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgrl.nnx import DANN

KEYS = {"USPS": ("Xt", "Yt"), "MNIST": ("Xs", "Ys")}


def read_digits(path: pathlib.Path, refuse: Callable[[str], Any]) -> dict[str, Any]:
    """Returns images [n, 16, 16, 1] and labels 0 to 9 of USPS and of MNIST.

    The file is HDF5 (MATLAB v7.3). Its keys, with axes as h5py gives them::

        Xs  [2000, 256]  images of MNIST, rows of 16 x 16 pixels, white (1) on black (0)
        Ys  [1, 2000]    their labels, digit + 1: 1 to 10
        Xt  [1800, 256]  images of USPS, likewise
        Yt  [1, 1800]    their labels, likewise

    Args:
      path: Of the file.
      refuse: Is called with what is wrong with it, and does not return.
    """
    found, sets = {}, {}
    try:
        with h5py.File(path) as file:
            found = {k: v[()] for k, v in file.items() if isinstance(v, h5py.Dataset)}
    except OSError:
        kind = "an HDF5 file (MATLAB v7.3)" if path.is_file() else "an existing file"
        refuse(f"--data must be {kind}, got {path}")
    for name, (x, y) in KEYS.items():
        if x not in found or y not in found:
            keys = ", ".join(found) or "none"
            refuse(f"--data must hold arrays Xs, Ys, Xt and Yt, got {keys} in {path}")
        images, labels = np.asarray(found[x]), np.asarray(found[y])
        shapes = images.shape, labels.shape
        if shapes != ((labels.size, 256), (1, labels.size)):
            rule = f"{x} of shape [n, 256] and {y} of shape [1, n]"
            refuse(f"--data must hold {rule}, got {shapes} in {path}")
        if set(labels.flat) != set(range(1, 11)) or not np.isfinite(images).all():
            rule = f"finite pixels in {x} and labels 1 to 10 in {y}"
            refuse(f"--data must hold {rule}, got others in {path}")
        # Each image with mean 0 and contrast 1: inks and scanners differ.
        images = images - images.mean(axis=1, keepdims=True)
        images = images / (images.std(axis=1, keepdims=True) + 1e-3)
        sets[name] = np.float32(images).reshape(-1, 16, 16, 1), np.int32(labels[0]) - 1
    return sets


def warped(images: Any, key: Any) -> Any:
    """Returns images moved by up to a pixel, 10 degrees and a tenth of their size."""
    shape = 5, len(images), 1, 1
    turn, wide, high, right, down = jax.random.uniform(key, shape, minval=-1.0)
    cos, sin = jnp.cos(turn * jnp.pi / 18), jnp.sin(turn * jnp.pi / 18)
    y, x = (grid[None] for grid in jnp.mgrid[-7.5:8:1, -7.5:8:1])
    rows = (sin * x + cos * y) * jnp.exp(high / 10) + down + 7.5
    columns = (cos * x - sin * y) * jnp.exp(wide / 10) + right + 7.5
    move = functools.partial(jax.scipy.ndimage.map_coordinates, order=1, mode="nearest")
    moved = jax.vmap(lambda image, *at: move(image, at))(images[..., 0], rows, columns)
    # Without a barrier XLA warps anew for each of the nine shifts of a convolution.
    return jax.lax.optimization_barrier(moved[..., None])


class Block(nnx.Module):
    """A convolution of 3 x 3, relu, and the maximum over squares of 2 x 2."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.linear = nnx.Linear(9 * inputs, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, n, n, inputs] to [batch, n / 2, n / 2, outputs]."""
        n, x = x.shape[1], jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        # As one product: in a scan on the CPU nnx.Conv took 17 times as long.
        shifted = [x[:, i : i + n, j : j + n] for i in range(3) for j in range(3)]
        x = nnx.relu(self.linear(jnp.concatenate(shifted, axis=-1)))
        return x.reshape(len(x), n // 2, 2, n // 2, 2, -1).max(axis=(2, 4))


def make_cnn(rngs: nnx.Rngs, condition: Any = None) -> DANN:
    """Returns a DANN for images of 16 x 16, or a CDAN: two blocks, a dense layer."""
    linear = functools.partial(nnx.Linear, rngs=rngs)
    features = nnx.Sequential(
        Block(1, 16, rngs),
        Block(16, 32, rngs),
        lambda x: x.reshape(len(x), 512),
        linear(512, 128),
        nnx.relu,
    )
    # CDAN's discriminator sees the product of 128 features and 10 probabilities.
    seen = 128 * 10 if condition else 128
    discriminator = nnx.Sequential(linear(seen, 256), nnx.relu, linear(256, 1))
    return DANN(features, linear(128, 10), discriminator, condition=condition)
