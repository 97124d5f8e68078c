"""The features of a data set: computed once, kept, and served in any order."""

import contextlib
import functools
import hashlib
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from lrmult._arguments import abstract, number_of_examples, paths_of
from lrmult._errors import FeaturesError, in_bytes, listing, show, spec
from lrmult._feature_files import FeatureFiles
from lrmult._levels import PyTree
from lrmult._marks import fingerprint
from lrmult._precompute import Precomputed
from lrmult._splitting import Feature
from lrmult._stability import ONCE, by_example, check_program, check_trial, trial_batches

Array = npt.NDArray[Any]

_FORMAT = 1
_CHUNK = 1024  # examples that are read at a time for a fingerprint
_SECONDS = 1.0  # between two notes of how far it has come


class CachedFeatures:
    """What a frozen front makes of a data set: computed once, in memory or in files.

    It takes the place of the data set in training, with `Precomputed.rest` in that of the loss
    function::

        for epoch in range(20):
            for features in cached.batches(64, seed=epoch):
                params, state = step(params, state, features)

    In files the work survives a stop: made again with the same arguments, it goes on where it was,
    and nothing is computed once it is complete. What it is made of is known by fingerprints: of the
    front, of the frozen parameters that this reads, and of the data, which is read for it once. So
    features of something else are never taken in silence, while other layers behind the same
    frozen ones find theirs.

    Features are refused where those of an example would not stay what they are: if the front draws
    random numbers, has an effect on the host, or mixes the examples of a batch, as batch
    normalization in training mode does. That is looked up in the program, and then tried: the
    examples of a batch, among others and in other places, must have the same features.

    Attributes:
        path: the directory of the files; None in memory.
        nbytes: the bytes of all features.

    Args:
        precomputed: what `precompute` returned.
        params: the parameters.
        data: the data set: a tree like the batch, with all examples in place of a few. Arrays of
            which slices can be taken are enough (`numpy.memmap`, h5py, Zarr).
        path: a directory for the features, which is made if needed: a ``.npy`` file for each array,
            which is mapped and not read. By default they are kept in memory.
        dtype: a narrower dtype, such as ``jnp.bfloat16``, in which to keep what the front computes
            in floating point. What it hands on of the data keeps its own.
        batch_size: how many examples are computed at a time; by default as many as the batch had
            that `precompute` was given.
        progress: whether to tell on stderr what size the features will have, and how far they are.

    Raises:
        FeaturesError: if features would not stay what they are, with the reason; if the data is
            not like the batch; if files are of another front, other parameters or other data; if
            the disk has no room.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"trunk": jnp.ones((64, 16)), "head": jnp.ones((16, 2))}
        >>> def loss_fn(params, batch):
        ...     hidden = jax.nn.relu(batch["x"] @ params["trunk"])
        ...     return jnp.mean((hidden @ params["head"] - batch["y"]) ** 2)
        >>> data = {"x": jnp.ones((100, 64)), "y": jnp.ones((100, 2))}
        >>> batch = jax.tree.map(lambda array: array[:8], data)
        >>> split = lm.precompute(loss_fn, params, [("trunk", None)], batch)
        >>> cached = lm.CachedFeatures(split, params, data, progress=False)
        >>> cached
        <lrmult.CachedFeatures of 100 examples, 7.2 kB in memory>
        >>> for features in cached.batches(50, seed=0):
        ...     print(f"{split.rest(params, features):.2e}")
        1.05e+06
        1.05e+06
        >>> cached.check({**params, "trunk": jnp.zeros((64, 16))})
        Traceback (most recent call last):
            ...
        lrmult.FeaturesError: the features are out of date: 'trunk' changed since they were
        computed; compute them again
    """

    def __init__(
        self,
        precomputed: Precomputed,
        params: PyTree,
        data: PyTree,
        *,
        path: str | os.PathLike[str] | None = None,
        dtype: Any = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> None:
        self._precomputed = precomputed
        self.path = None if path is None else pathlib.Path(path)
        check_program(precomputed.cut)
        self._axes = precomputed.example_axes
        self._data, self._count = _read_data(data, precomputed.batch, self._axes)
        self._size = number_of_examples(precomputed.batch, self._axes)
        if batch_size is not None:
            self._size = _positive(batch_size)
        self._features = precomputed.features
        dtypes = [_kept_dtype(feature, dtype) for feature in self._features]
        shapes = [_kept_shape(feature, self._count) for feature in self._features]
        self.nbytes = int(sum(map(_nbytes, shapes, dtypes)))
        self._marks = precomputed.fingerprints(params)
        self._try(params)
        self._files = None
        if self.path is not None:
            facts = {
                "format": _FORMAT,
                "front": precomputed.cut.mark(),
                "parameters": self._marks,
                "data": self._mark_of_data(),
                "arrays": list(map(spec, shapes, dtypes)),
            }
            self._files = FeatureFiles(self.path, shapes, dtypes, facts, self._count)
        self._arrays = self._files.arrays if self._files else list(map(np.empty, shapes, dtypes))
        self._fill(params, progress)
        self._fixed = {
            i: jnp.asarray(array)
            for i, (array, feature) in enumerate(zip(self._arrays, self._features, strict=True))
            if feature.axis is None
        }

    def __len__(self) -> int:
        """How many examples there are."""
        return self._count

    def __getitem__(self, index: Any) -> tuple[Any, ...]:
        """The features of some examples, as `Precomputed.rest` takes them.

        Args:
            index: the numbers of the examples, in any order, or a slice.

        Raises:
            FeaturesError: if it is none of these, or there is no such example.
        """
        numbers = np.asarray(index)
        if isinstance(index, slice) or numbers.size == 0 or numbers.shape == (self._count,):
            whole = slice(0) if not isinstance(index, slice) and numbers.size == 0 else index
            if isinstance(whole, slice) or numbers.dtype == bool:
                numbers = np.arange(self._count)[whole]
        if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
            raise FeaturesError(f"write the numbers of examples, or a slice, not {show(index)}")
        if numbers.size and not -self._count <= numbers.min() <= numbers.max() < self._count:
            raise FeaturesError(
                f"there are {self._count:,} examples, but numbers from {numbers.min()} to "
                f"{numbers.max()} are asked for"
            )
        found: list[Any] = []
        for i, (array, feature) in enumerate(zip(self._arrays, self._features, strict=True)):
            if feature.axis is None:
                found.append(self._fixed[i])
                continue
            taken = np.asarray(array[numbers])
            if feature.rows > 1:
                taken = taken.reshape(-1, *taken.shape[2:])
            found.append(np.moveaxis(taken, 0, feature.axis))
        return tuple(found)

    def batches(
        self, batch_size: int, *, seed: int | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Any, ...]]:
        """The features of all examples once, in batches, as `Precomputed.rest` takes them.

        Args:
            batch_size: how many examples each has. The last one may have fewer, or one more: a
                single example that is left over joins it.
            seed: of the order of the examples, such as the number of the epoch; by default their
                order is that of the data set.
            drop_last: whether to leave out a last batch of fewer examples.
        """
        _positive(batch_size)
        order = np.arange(self._count)
        if seed is not None:
            order = np.random.default_rng(seed).permutation(self._count)
        end = self._count - (self._count % batch_size if drop_last else 0)
        starts = [*range(0, end, batch_size), end]
        if len(starts) > 2 and end - starts[-2] == 1 < batch_size:
            # Many a function does other things with one example alone.
            del starts[-2:-1]
        return (self[order[start:stop]] for start, stop in itertools.pairwise(starts))

    def check(self, params: PyTree) -> None:
        """Raise if the frozen parameters are not those that the features were computed with.

        It reads all of them that the front does: look once for each epoch, not at each step.

        Raises:
            FeaturesError: with the paths of those that changed.
        """
        now = self._precomputed.fingerprints(params)
        changed = [path for path, mark in self._marks.items() if now.get(path) != mark]
        if changed:
            raise FeaturesError(
                f"the features are out of date: {listing(changed)} changed since they were "
                "computed; compute them again"
            )

    def __repr__(self) -> str:
        where = "memory" if self.path is None else str(self.path)
        size = in_bytes(self.nbytes)
        return f"<lrmult.CachedFeatures of {self._count:,} examples, {size} in {where}>"

    def _mark_of_data(self) -> str:
        """A fingerprint of the data set."""
        mark = hashlib.blake2b(digest_size=16)
        for leaf, axis in zip(self._data, self._axes, strict=True):
            for start in range(0, self._count if axis is not None else 1, _CHUNK):
                mark.update(fingerprint(_some(leaf, axis, start, start + _CHUNK)).encode())
        return mark.hexdigest()

    def _batch(self, start: int) -> PyTree:
        """A batch of the examples from a place on; where there are fewer, the last is repeated."""
        leaves = []
        for leaf, axis in zip(self._data, self._axes, strict=True):
            part = _some(leaf, axis, start, start + self._size)
            if axis is not None and part.shape[axis] < self._size:
                numbers = np.minimum(np.arange(self._size), part.shape[axis] - 1)
                part = np.take(part, numbers, axis)
            leaves.append(part)
        return self._like_batch(leaves)

    def _like_batch(self, leaves: list[Any]) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(self._precomputed.batch), leaves)

    def _try(self, params: PyTree) -> None:
        """Raise if features hang on the other examples of a batch, or on places in it."""
        if self._count == 1:
            return
        runs = []
        for numbers in trial_batches(max(self._size, 2), self._count):
            leaves = [
                leaf if axis is None else _gathered(leaf, axis, numbers)
                for leaf, axis in zip(self._data, self._axes, strict=True)
            ]
            found = self._precomputed.front(params, self._like_batch(leaves))
            runs.append((numbers.tolist(), found))
        check_trial(self._features, runs)

    def _fill(self, params: PyTree, progress: bool) -> None:
        """Compute what is not there yet."""
        done = self._files.done if self._files else 0
        if done == self._count:
            return
        with _bar(repr(self)[1:-1], self._count, done, progress) as advance:
            noted = time.monotonic()
            try:
                for stop, found in self._computed(params, done):
                    self._keep(found, done, stop)
                    advance(stop - done)
                    done = stop
                    if self._files and time.monotonic() > noted + _SECONDS:
                        self._files.note(done)
                        noted = time.monotonic()
            finally:
                if self._files:
                    self._files.note(done)

    def _computed(self, params: PyTree, done: int) -> Iterator[tuple[int, tuple[jax.Array, ...]]]:
        """Features of one batch after the other, the next of which is under way already."""
        waiting = None
        for start in range(done, self._count, self._size):
            stop = min(start + self._size, self._count)
            found = stop, self._precomputed.front(params, self._batch(start))
            if waiting:
                yield waiting
            waiting = found
        if waiting:
            yield waiting

    def _keep(self, found: tuple[jax.Array, ...], start: int, stop: int) -> None:
        for feature, array, kept in zip(self._features, found, self._arrays, strict=True):
            fresh = np.asarray(array)
            if feature.axis is None:
                kept[...] = fresh
                continue
            fresh = by_example(fresh, feature)[: stop - start]
            with np.errstate(over="ignore"):
                narrow = fresh.astype(kept.dtype).reshape(stop - start, *kept.shape[1:])
            if kept.dtype != fresh.dtype and np.isfinite(fresh).all() > np.isfinite(narrow).all():
                raise FeaturesError(
                    f"{kept.dtype} has no numbers as large as {np.abs(fresh).max():.3g}, which are "
                    f"among the features ({feature.origin}); keep them in bfloat16"
                )
            if np.count_nonzero(narrow) < 0.99 * np.count_nonzero(fresh):
                raise FeaturesError(
                    f"more than 1% of the features ({feature.origin}) would become zero in "
                    f"{kept.dtype}; keep them in bfloat16"
                )
            kept[start:stop] = narrow


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise FeaturesError(f"a batch has one example at least, not {batch_size}")
    return batch_size


def _read_data(data: PyTree, batch: PyTree, axes: Sequence[int | None]) -> tuple[list[Any], int]:
    """The arrays of a data set, and how many examples it has."""
    wanted, leaves = jax.tree.leaves(batch), jax.tree.leaves(data)
    treedef: Any = jax.tree.structure(batch)
    found: Any = jax.tree.structure(data)
    if bool(found != treedef):
        raise FeaturesError(
            f"the data is structured like {found}, and not like the batch, {treedef}; pass all "
            "examples in the arrays of one batch"
        )
    leaves = [leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for leaf in leaves]
    if any(jnp.issubdtype(abstract(leaf).dtype, jax.dtypes.prng_key) for leaf in leaves):
        raise FeaturesError(f"there is a random key in the data, which {ONCE}")
    counts = {}
    for path, leaf, like, axis in zip(paths_of(batch), leaves, wanted, axes, strict=True):
        name = repr(path) if path else "the array"
        shape = tuple(leaf.shape)
        if axis is not None and len(shape) == len(like.shape):
            counts[name] = shape[axis]
            shape = (*shape[:axis], like.shape[axis], *shape[axis + 1 :])
        if shape != like.shape or abstract(leaf).dtype != like.dtype:
            raise FeaturesError(
                f"{name} of the data is {spec(leaf.shape, leaf.dtype)}, which is not like "
                f"{spec(like.shape, like.dtype)} in the batch"
            )
    if len({*counts.values()}) != 1 or 0 in counts.values():
        seen = ", ".join(f"{count:,} in {name}" for name, count in counts.items())
        raise FeaturesError(f"the data has not one number of examples: {seen or 'there are none'}")
    return leaves, next(iter(counts.values()))


def _some(leaf: Any, axis: int | None, start: int, stop: int) -> Array:
    """Some examples of an array; the whole of it if it holds none."""
    place = (...,) if axis is None else (slice(None),) * axis + (slice(start, stop),)
    found: Array = np.asarray(leaf[place])
    return found


def _gathered(leaf: Any, axis: int, numbers: Any) -> Array:
    """Some examples of an array, each read as a slice, which is all that it needs to support."""
    parts = [_some(leaf, axis, number, number + 1) for number in numbers.tolist()]
    return np.concatenate(parts, axis)


def _kept_dtype(feature: Feature, told: Any) -> Any:
    """The dtype in which a feature is kept."""
    dtype = np.dtype(feature.dtype)
    if told is None:
        return dtype
    told = jnp.dtype(told)
    if not jnp.issubdtype(told, jnp.floating):
        raise FeaturesError(f"dtype={told} holds no floating-point numbers; take jnp.bfloat16")
    narrows = jnp.issubdtype(dtype, jnp.floating) and told.itemsize < dtype.itemsize
    return told if narrows and feature.is_computed else dtype


def _kept_shape(feature: Feature, count: int) -> tuple[int, ...]:
    """The shape in which a feature of all examples is kept: these along the first axis."""
    if feature.axis is None:
        return feature.shape
    others = [n for axis, n in enumerate(feature.shape) if axis != feature.axis]
    return (count, *([feature.rows] if feature.rows > 1 else []), *others)


def _nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * int(dtype.itemsize)


@contextlib.contextmanager
def _bar(text: str, total: int, done: int, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """A line about what is computed, and how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True, quiet=not is_shown)
    console.print(text, highlight=False, soft_wrap=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not is_shown) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield functools.partial(bar.advance, task)
