"""scikit-learn's handwritten digits, upright and rotated."""

import functools
from typing import Any

import numpy as np
import scipy.ndimage
import sklearn.datasets

SOURCE = 650  # images of the source domain, and as many of the target


@functools.cache
def rotated(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns all images [n, 64], from 0 to 1, rotated by degrees, and their labels."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    images = scipy.ndimage.rotate(images, angle, (2, 1), reshape=False, order=1)
    return images.reshape(-1, 64), labels.astype(np.int32)


def rotated_digits(angle: float, seed: int) -> dict[str, Any]:
    """Returns a random split: upright source, rotated target, and a rotated test.

    No image is in two of the three.
    """
    (upright, labels), (turned, _) = rotated(0.0), rotated(angle)
    order = np.random.default_rng(seed).permutation(len(labels))
    source, target, test = np.split(order, [SOURCE, 2 * SOURCE])
    return {
        "source": upright[source],
        "source_labels": labels[source],
        "target": turned[target],
        "test": turned[test],
        "test_labels": labels[test],
    }
