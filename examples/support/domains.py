"""Images of a labelled source and an unlabelled target: digits, folders or arrays."""

import hashlib
import multiprocessing.pool
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
import sklearn.datasets
from PIL import Image

from .run import LARGEST

SUFFIXES = {".png", ".jpg", ".jpeg"}


class Domains(NamedTuple):
    """Two sequences of images, and what a network for them must know.

    Attributes:
      source: Gives images and labels for an array of indices.
      target: Gives images for an array of indices.
      shape: Of an image, height, width and channels.
      classes: The number of labels.
      fingerprint: Names the data in a checkpoint, so that no other data follow it.
    """

    source: Any
    target: Any
    shape: tuple[int, int, int]
    classes: int
    fingerprint: str


class Labelled:
    """Images with their labels, as pairs."""

    def __init__(self, images: Any, labels: Any):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        """Returns images and their labels."""
        return self.images[index], self.labels[index]


class Files:
    """Images that are read when they are asked for."""

    def __init__(self, paths: Sequence[pathlib.Path], mode: str):
        self.paths, self.mode = paths, mode

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        """Returns images [..., height, width, channels] of bytes."""
        if np.ndim(index):
            return np.stack([self[i] for i in index])
        try:
            with Image.open(self.paths[index]) as image:
                pixels = np.asarray(image.convert(self.mode))
        except Exception as error:
            error.add_note(f"Reading {self.paths[index]}")
            raise
        return pixels.reshape(*pixels.shape[:2], -1)


def read_domains(path: pathlib.Path | None, refuse: Callable[[str], Any]) -> Domains:
    """Returns the images at a path, or scikit-learn's digits if it is None.

    Args:
      path: A folder with ``source/CLASS/*.png`` and ``target/**/*.png`` (or .jpg),
        without hidden files and folders, or a NumPy archive (.npz) of ``source`` and
        ``target``, both [n, height, width] or [n, height, width, channels], and
        ``source_labels`` [n].
      refuse: Is called with what is wrong with it, and does not return.
    """
    if path is None:
        return _digits()
    if path.is_dir():
        return _folders(path, refuse)
    if not path.is_file():
        refuse(f"--data must be a folder or a file of arrays, got {path}")
    return _arrays(path, refuse)


def _digits() -> Domains:
    """Returns digits of 32 x 32 pixels: upright 1000, and 797 others rotated."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    large = scipy.ndimage.zoom(images.reshape(-1, 8, 8), (1, 4, 4), order=1)
    turned = scipy.ndimage.rotate(large[1000:], 25, (2, 1), reshape=False, order=1)
    source, target = (
        np.uint8(x[..., None] * (255 / 16)) for x in (large[:1000], turned)
    )
    pairs = Labelled(source, labels[:1000].astype(np.int32))
    return Domains(pairs, target, (32, 32, 1), 10, "digits")


def _folders(path: pathlib.Path, refuse: Callable[[str], Any]) -> Domains:
    """Returns the images of a folder; each file's header is read, and no pixel."""

    def images(folder: pathlib.Path) -> list[pathlib.Path]:
        found = []
        for at, folders, names in os.walk(folder, onerror=fail, followlinks=True):
            here = pathlib.Path(at).resolve()
            above = [here, *here.parents]  # a link to one of these would never end
            visible = [f for f in folders if f[0] != "."]
            folders[:] = [f for f in visible if (here / f).resolve() not in above]
            found += [pathlib.Path(at, name) for name in names if name[0] != "."]
        return sorted(p for p in found if p.suffix.lower() in SUFFIXES)

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            refuse(f"--data must be readable, got {error}")

    source, target = images(path / "source"), images(path / "target")
    names = [p.relative_to(path / "source").parts[0] for p in source]
    classes = sorted(set(names))
    if len(classes) < 2 or any(p.parent == path / "source" for p in source):
        rule = "source/CLASS/*.png of 2 or more classes"
        refuse(f"--data must hold {rule}, got {len(classes)} in {path / 'source'}")
    if not target:
        refuse(f"--data must hold images in target, got none in {path / 'target'}")
    files, digest = [*source, *target], hashlib.sha256()
    Image.init()  # before threads do
    with multiprocessing.pool.ThreadPool(32) as pool:  # over a network each waits
        headers = pool.map(_header, files)
    size = headers[0][0]
    for file, (found, mode, length) in zip(files, headers, strict=True):
        if not mode:
            refuse(f"--data must hold images, got {file}")
        if found != size:
            rule = f"images of one size, {size[0]} x {size[1]}"
            refuse(f"--data must hold {rule}, got {found[0]} x {found[1]} in {file}")
        if mode[0] in "IF":  # Pillow would cut it off at 255
            refuse(f"--data must hold images of bytes, got mode {mode} in {file}")
        digest.update(os.fsencode(f"{file.relative_to(path)} {length}\n"))
    mode = "L" if {mode for _, mode, _ in headers} <= {"1", "L"} else "RGB"
    labels = np.array([classes.index(name) for name in names], np.int32)
    shape = size[1], size[0], 3 if mode == "RGB" else 1
    name = f"files {digest.hexdigest()[:16]}"
    pairs = Labelled(Files(source, mode), labels)
    return Domains(pairs, Files(target, mode), shape, len(classes), name)


def _header(file: pathlib.Path) -> tuple[tuple[int, int], str, int]:
    """Returns size, mode and length of a file, the mode empty if it is no image."""
    try:
        with Image.open(file) as image:
            return image.size, image.mode, file.stat().st_size
    # The second and third: what is too large for Pillow.
    except (OSError, ValueError, Image.DecompressionBombError):
        return (0, 0), "", 0


def _arrays(path: pathlib.Path, refuse: Callable[[str], Any]) -> Domains:
    """Returns the images of a NumPy archive."""
    found: dict[str, Any] = {}
    names: list[str] = []
    keys = ("source", "source_labels", "target")
    try:
        # Without pickles: a file of them runs what its author wants.
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            found = {name: file[name] for name in keys if name in names}
    except Exception as error:  # whatever a damaged archive raises
        refuse(f"--data must be a NumPy archive of plain arrays, got {path}: {error}")
    if len(found) < len(keys):
        got = ", ".join(names) or "none"
        refuse(f"--data must hold {', '.join(keys)}, got {got} in {path}")
    source, labels, target = (found[key] for key in keys)
    shapes = source.shape, labels.shape, target.shape
    fits = source.ndim in (3, 4) and target.shape[1:] == source.shape[1:]
    if (
        not fits
        or labels.shape != source.shape[:1]
        or not all(map(np.size, (source, target)))
    ):
        rule = "source and target [n, height, width(, channels)] and source_labels [n]"
        refuse(f"--data must hold {rule}, got {shapes} in {path}")
    for name, images in (("source", source), ("target", target)):
        is_float = np.issubdtype(images.dtype, np.floating)
        finite = is_float and (abs(images) <= LARGEST).all()
        if not (images.dtype == np.uint8 or finite):
            rule = f"bytes or finite floats in {name}, as float32"
            refuse(f"--data must hold {rule}, got {images.dtype} in {path}")
    if source.dtype != target.dtype:
        rule = "source and target of one dtype"
        refuse(f"--data must hold {rule}, got {source.dtype} and {target.dtype}")
    values = np.unique(labels)
    classes, is_number = len(values), labels.dtype.kind in "biuf"
    if classes < 2 or not is_number or set(values.tolist()) != set(range(classes)):
        rule = "source_labels 0 to C - 1 of 2 or more classes"
        refuse(f"--data must hold {rule}, got {values[:10]} in {path}")
    digest = hashlib.sha256()
    for array in (source, labels, target):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    if source.ndim == 3:
        source, target = source[..., None], target[..., None]
    if source.dtype != np.uint8:
        source, target = source.astype(np.float32), target.astype(np.float32)
    height, width, channels = source.shape[1:]
    name = f"arrays {digest.hexdigest()[:16]}"
    pairs = Labelled(source, labels.astype(np.int32))
    return Domains(pairs, target, (height, width, channels), classes, name)
