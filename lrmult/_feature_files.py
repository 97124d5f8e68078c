"""Features in files: arrays that are mapped, and a note of what they are and how far they are."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from lrmult._errors import FeaturesError, in_bytes, listing, show

Array = npt.NDArray[Any]

_NOTE = "features.json"


class FeatureFiles:
    """The arrays of features in a directory.

    Attributes:
        arrays: the arrays.
        done: how many examples they hold.

    Args:
        path: the directory.
        shapes: the shape of each array.
        dtypes: the dtype of each array.
        facts: what the features are made of, under the names in `_FACTS`.
        count: how many examples there are. Files that hold all of them are only read.

    Raises:
        FeaturesError: if it holds something else, or the disk has no room.
    """

    def __init__(
        self,
        path: pathlib.Path,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[Any],
        facts: Mapping[str, Any],
        count: int,
    ) -> None:
        self._path, self._facts = path, facts
        done = self._read_note()
        if done is None:
            sizes = [
                np.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)
            ]
            self._make_room(int(sum(sizes)))
            # The note comes first: what has one is a directory of features.
            self._write_note(0, os.link)
        self.arrays = [
            self._map(path / f"{i}.npy", shape, np.dtype(dtype), done is None, done == count)
            for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        ]
        self.done = done or 0

    def note(self, done: int) -> None:
        """Note how many examples the files hold now, at once or not at all."""
        for array in self.arrays:
            if isinstance(array, np.memmap):
                array.flush()
        self._write_note(done, os.replace)

    def _write_note(self, done: int, place: Callable[[pathlib.Path, pathlib.Path], None]) -> None:
        fresh = self._path / f"{_NOTE}.{os.getpid()}"
        fresh.write_text(json.dumps({**self._facts, "done": done}, indent=2))
        _put(fresh, self._path / _NOTE, place)

    def _read_note(self) -> int | None:
        """How many examples the files hold; None if there are none."""
        path, file = self._path, self._path / _NOTE
        if not file.exists():
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise FeaturesError(
                    f"{path} is something else than features; write a directory of their own"
                )
            return None
        try:
            before = json.loads(file.read_text())
            done = int(before["done"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FeaturesError(
                f"{file} cannot be read ({show(error)}); remove {path} to begin anew"
            ) from error
        for name, what in _FACTS.items():
            then, now = before.get(name), self._facts[name]
            if then != now:
                if isinstance(then, dict):
                    changed = [key for key in {*then, *now} if then.get(key) != now.get(key)]
                    what += f" ({listing(sorted(changed))})"
                raise FeaturesError(
                    f"{path} holds features of {what}; write another path, or remove it to compute "
                    "them again"
                )
        return done

    def _make_room(self, size: int) -> None:
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._path).free
        except OSError as error:
            raise FeaturesError(f"{self._path} cannot be made: {error}") from error
        if free < size:
            raise FeaturesError(
                f"the features take {in_bytes(size)}, but {self._path} has {in_bytes(free)} left; "
                "write a narrower dtype=, or another path"
            )

    def _map(
        self, file: pathlib.Path, shape: tuple[int, ...], dtype: Any, is_new: bool, is_full: bool
    ) -> Array:
        plain = np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" else dtype
        try:
            if is_new or (not file.exists() and not self._has_begun()):
                # Another process may make the same file: the first one counts.
                fresh = file.with_name(f"{file.name}.{os.getpid()}")
                open_memmap(fresh, "w+", plain, shape)
                _put(fresh, file, os.link)
            found = np.load(file, mmap_mode="r")  # sees what is cut off; "r+" would fill it up
            if not is_full:
                found = open_memmap(file, "r+")
        except (OSError, ValueError) as error:
            raise FeaturesError(
                f"{file} cannot be mapped ({error}); remove {self._path} to begin anew"
            ) from error
        if found.shape != shape or found.dtype != plain:
            raise FeaturesError(f"{file} was changed; remove {self._path} to begin anew")
        array: Array = found.view(dtype)
        return array

    def _has_begun(self) -> bool:
        return bool(self._read_note())


def _put(fresh: pathlib.Path, file: pathlib.Path, place: Callable[..., None]) -> None:
    """Move a file to its place, by `os.replace`, or by `os.link` if nothing is there."""
    try:
        place(fresh, file)
    except FileExistsError:
        pass
    finally:
        fresh.unlink(missing_ok=True)


_FACTS = {
    "format": "another version of lrmult",
    "front": "another frozen part, or another loss function",
    "parameters": "other frozen parameters",
    "data": "other data",
    "arrays": "another data set, or in another dtype",
}
