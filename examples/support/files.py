"""How a file of results is written, and the versions that it names."""

import importlib.metadata
import pathlib
import platform
from collections.abc import Callable, Iterable
from typing import Any


def replace(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Lets ``write`` fill a draft, which takes the place of the file in one move."""
    draft = path.with_name(f"{path.name}.part")
    write(draft)
    draft.replace(path)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
