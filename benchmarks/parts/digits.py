"""scikit-learn's handwritten digits: an upright and a rotated domain."""

from typing import Any

import numpy as np
import scipy.ndimage
import sklearn.datasets

SOURCE = 650  # images of the source domain, and as many of the target


def rotated_digits(angle: float, seed: int) -> dict[str, Any]:
    """Returns a random split: upright source, rotated target, and a rotated test.

    Images are [n, 64], from 0 to 1, and no image is in two of the three.
    """
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    rotated = scipy.ndimage.rotate(images, angle, (2, 1), reshape=False, order=1)
    order = np.random.default_rng(seed).permutation(len(images))
    source, target, test = np.split(order, [SOURCE, 2 * SOURCE])
    return {
        "source": images[source].reshape(-1, 64),
        "source_labels": labels[source].astype(np.int32),
        "target": rotated[target].reshape(-1, 64),
        "test": rotated[test].reshape(-1, 64),
        "test_labels": labels[test].astype(np.int32),
    }
