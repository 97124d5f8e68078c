"""Parts of arrays as sets of elements, kept factored. NumPy only: no trees, no rules, no jax.

A region of an array is the set of elements that several conditions allow together: along some axes
a boolean vector, and any number of element masks. A part along an axis is thus as small as that
axis, whatever the size of the array.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lrmult._errors import IndexRangeError, MaskError
from lrmult._patterns import Span

Bools: TypeAlias = npt.NDArray[np.bool_]
Shape: TypeAlias = tuple[int, ...]


_CORNER = 64


class Mask:
    """A boolean array that is no outer product of vectors, packed to bits along its last axis.

    Equal masks are equal and have one hash.
    """

    def __init__(self, dense: Bools) -> None:
        self.shape: Shape = dense.shape
        self.packed = np.packbits(dense, axis=-1)
        self.packed.setflags(write=False)
        self._key = (self.shape, hashlib.blake2b(self.packed.tobytes()).digest())

    def dense(self) -> Bools:
        """The boolean array."""
        return np.unpackbits(self.packed, axis=-1, count=self.shape[-1]).view(np.bool_)

    def corner(self) -> "Mask":
        """The first elements, along every axis as many as `_CORNER`."""
        packed = self.packed[(slice(_CORNER),) * (self.packed.ndim - 1) + (slice(_CORNER // 8),)]
        count = min(_CORNER, self.shape[-1])
        return Mask(np.unpackbits(packed, axis=-1, count=count).view(np.bool_))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class Flags:
    """A boolean vector; hashable."""

    def __init__(self, vector: Bools) -> None:
        self._size = len(vector)
        self._packed = np.packbits(vector).tobytes()

    @property
    def vector(self) -> Bools:
        packed = np.frombuffer(self._packed, np.uint8)
        return np.unpackbits(packed, count=self._size).view(np.bool_)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Flags) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self._size, self._packed))


Index: TypeAlias = int | Span | tuple[int, ...] | Flags


def select(index: Index, size: int, axis: str) -> Bools:
    """The places that an index means on an axis, as a boolean vector of its size.

    Raises:
        IndexRangeError: if it lies outside, or selects nothing; `axis` is how the message names it.
        MaskError: if it is a boolean vector of another size.
    """
    chosen = np.zeros(size, np.bool_)
    if isinstance(index, Flags):
        chosen = index.vector
        if len(chosen) != size:
            raise MaskError(
                f"a boolean vector of {len(chosen)} does not fit {axis}, which has size {size}; it "
                "needs one value for each place"
            )
    elif isinstance(index, Span):
        chosen[slice(*index)] = True
    else:
        places = (index,) if isinstance(index, int) else index
        for place in places:
            if not -size <= place < size:
                raise IndexRangeError(
                    f"the index {place} is out of range for {axis}, which has size {size}; write "
                    f"{f'ints from {-size} to {size - 1}' if size else 'another target'}"
                )
        chosen[list(places)] = True
    if size and not chosen.any():
        raise IndexRangeError(
            f"its index selects nothing on {axis}, which has size {size}; write another, or leave "
            "it out"
        )
    return chosen


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Some elements of an array: those that all of its vectors and masks allow.

    Attributes:
        vectors: for each axis that matters, a boolean vector of its size.
        masks: element masks, each of the array's shape.
    """

    vectors: dict[int, Bools] = dataclasses.field(default_factory=dict)
    masks: tuple[Mask, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether it leaves out nothing."""
        return not self.vectors and not self.masks

    def is_empty(self, shape: Shape) -> bool:
        """Whether it holds no element; in an array without elements none is missing."""
        if math.prod(shape) == 0:
            return False
        if not all(vector.any() for vector in self.vectors.values()):
            return True
        alone = not self.masks or (len(self.masks) == 1 and not self.vectors)
        return not alone and not self.dense(shape).any()

    def along(self, axis: int, vector: Bools) -> "Region":
        """What of it a vector along an axis allows as well."""
        vector = vector & self.vectors[axis] if axis in self.vectors else vector
        vectors = {key: known for key, known in self.vectors.items() if key != axis}
        if not vector.all() or not vector.size:
            vectors[axis] = vector
        return Region(dict(sorted(vectors.items())), self.masks)

    def corner(self) -> "Region":
        """What it holds of the first elements."""
        vectors = {axis: vector[:_CORNER] for axis, vector in self.vectors.items()}
        return Region(vectors, tuple([mask.corner() for mask in self.masks]))

    def within(self, other: "Region") -> "Region":
        """What both allow."""
        region = Region(self.vectors, tuple(dict.fromkeys(self.masks + other.masks)))
        for axis, vector in other.vectors.items():
            region = region.along(axis, vector)
        return region

    def dense(self, shape: Shape) -> Bools:
        """The region as a boolean array of the array's shape."""
        found = np.ones(shape, np.bool_)
        for axis, vector in self.vectors.items():
            found &= spread(vector, axis, len(shape))
        for mask in self.masks:
            found &= mask.dense()
        return found


WHOLE = Region()


def spread(vector: Any, axis: int, ndim: int) -> npt.NDArray[Any]:
    """A vector along an axis, in a shape that broadcasts against the array."""
    shaped: npt.NDArray[Any] = vector.reshape([-1 if each == axis else 1 for each in range(ndim)])
    return shaped


def factor(dense: Bools) -> Region:
    """The region of the true elements: vectors alone, if the mask is an outer product of them.

    An array of bools lies inside the product of its projections onto the axes, so it *is* that
    product if both have as many elements.
    """
    if not dense.size:  # whose axes may be of any length all the same
        return WHOLE
    axes = range(dense.ndim)
    shadows: list[Any] = [dense.any(axis=tuple(a for a in axes if a != axis)) for axis in axes]
    if np.count_nonzero(dense) != math.prod(np.count_nonzero(shadow) for shadow in shadows):
        return Region(masks=(Mask(dense),))
    region = WHOLE
    for axis, vector in enumerate(shadows):
        region = region.along(axis, vector)
    return region


def boxes(grid: Bools, axes: Sequence[int]) -> list[Region]:
    """Disjoint regions of vectors alone that make up the true places of a small array.

    Args:
        grid: the places.
        axes: for each of its axes, the axis of the array that it stands for.
    """
    if not grid.any():
        return []
    whole = factor(grid)
    if not whole.masks:
        return [Region({axes[axis]: vector for axis, vector in whole.vectors.items()})]
    flat = grid.reshape(len(grid), -1)
    patterns, which = np.unique(flat, axis=0, return_inverse=True)
    return [
        below.along(axes[0], which.reshape(-1) == number)
        for number, pattern in enumerate(patterns)
        for below in boxes(pattern.reshape(grid.shape[1:]), axes[1:])
    ]


class _Grid:
    """An array as far as some regions tell its elements apart.

    Along every axis, the places that no region tells apart are one. With element masks it is the
    array itself.
    """

    def __init__(self, shape: Shape, regions: Sequence[Region]) -> None:
        self._masked = any(region.masks for region in regions)
        self._firsts: dict[int, npt.NDArray[np.intp]] = {}  # axis -> for each place, one of its own
        self.atoms: dict[int, npt.NDArray[np.intp]] = {}  # axis -> for each of the array's, a place
        self.shape = list(shape) if self._masked else [1] * len(shape)
        # How many elements each place stands for.
        self._volume: Any = 1 if self._masked else math.prod(shape)
        if self._masked or not self._volume:
            return
        for axis in {axis for region in regions for axis in region.vectors}:
            known: list[Any] = [
                region.vectors[axis] for region in regions if axis in region.vectors
            ]
            _, self._firsts[axis], atoms, counts = np.unique(
                np.packbits(np.stack(known), axis=0).T,
                axis=0,
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            self.atoms[axis] = atoms.reshape(-1)
            self.shape[axis] = len(counts)
            self._volume = self._volume // shape[axis] * spread(counts, axis, len(shape))

    def places(self, region: Region) -> Bools:
        """Those that a region holds, in a shape that broadcasts."""
        found = np.ones((1,) * len(self.shape), np.bool_)
        for axis, vector in region.vectors.items():
            places = vector[self._firsts[axis]] if axis in self._firsts else vector
            found = found & spread(places, axis, len(self.shape))
        for mask in region.masks:
            found = found & mask.dense()
        return found

    def count(self, places: Bools) -> int:
        """How many elements some places stand for."""
        if self._masked:
            return int(np.count_nonzero(places))
        return int((places * self._volume).sum())


class FirstMatch:
    """Which of some regions is the first to hold each element of an array.

    Attributes:
        counts: per region, the number of elements that it is the first to hold.
        left: the number of elements that none holds.
    """

    def __init__(self, shape: Shape, regions: Sequence[Region]) -> None:
        self._grid = _Grid(shape, regions)
        free: Bools = np.ones(self._grid.shape, np.bool_)
        self._fresh: list[Bools] = []
        for region in regions:
            fresh = free & self._grid.places(region)
            free = free & ~fresh
            self._fresh.append(fresh)
        self.counts = [self._grid.count(fresh) for fresh in self._fresh]
        self.left = self._grid.count(free)

    def box(self, chosen: Sequence[bool]) -> Region:
        """The smallest region of vectors alone that holds all that some regions are first to hold.

        Args:
            chosen: for each region whether it is one of them.
        """
        held = np.zeros(self._grid.shape, np.bool_)
        for fresh, is_chosen in zip(self._fresh, chosen, strict=True):
            held |= fresh & is_chosen
        region = WHOLE
        axes = range(held.ndim)
        for axis in axes:
            shadow: Any = held.any(axis=tuple(each for each in axes if each != axis))
            region = region.along(axis, shadow[self._grid.atoms.get(axis, slice(None))])
        return region

    def varying(self, values: Sequence[float]) -> list[int]:
        """The axes along which the elements get unlike values, if each region gets one."""
        got = self._gets(values)
        return [
            axis
            for axis, size in enumerate(got.shape)
            if size > 1 and (got != got.take([0], axis=axis)).any()
        ]

    def line(self, axis: int, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """What the elements get, place by place along the one axis that matters."""
        got = np.moveaxis(self._gets(values), axis, 0)
        kinds: npt.NDArray[np.float64] = np.unique(np.asarray(values, np.float64))
        line = kinds[got.reshape(len(got), -1)[:, 0]]
        places = self._grid.atoms.get(axis, np.arange(len(line)))
        return np.asarray(line[places], np.float64)

    def _gets(self, values: Sequence[float]) -> npt.NDArray[Any]:
        """Per place of the grid, which of the distinct values it gets, by number."""
        kinds, which = np.unique(np.asarray(values, np.float64), return_inverse=True)
        got = np.zeros(self._grid.shape, np.min_scalar_type(len(kinds)))
        for fresh, kind in zip(self._fresh, which.reshape(-1), strict=True):
            got[fresh] = kind
        return got


def along_one_axis(
    shape: Shape, regions: Sequence[Region], values: Sequence[float]
) -> tuple[int, npt.NDArray[np.float64]] | None:
    """What each element of an array gets, if that depends on its place along one axis alone.

    Args:
        shape: the shape of the array.
        regions: regions that together hold all its elements; the first that holds one counts.
        values: what the elements of each region get.

    Returns:
        The axis, and a number for each place along it; None if no or several axes matter.
    """
    if any(region.masks for region in regions):
        # A corner rules most masks out, at no cost where the array is large.
        corner = tuple([min(size, _CORNER) for size in shape])
        match = FirstMatch(corner, [region.corner() for region in regions])
        if len(match.varying(values)) > 1:
            return None
    match = FirstMatch(shape, regions)
    axes = match.varying(values)
    return (axes[0], match.line(axes[0], values)) if len(axes) == 1 else None


def show_vector(vector: Bools) -> str:
    """Places along an axis as an index that means them: ``0:3``, ``5``, ``[0, 2, 7]``."""
    places = np.flatnonzero(vector).tolist()
    if len(places) == 1:
        return str(places[0])
    steps = set(np.diff(places).tolist())
    if len(steps) == 1 and (steps == {1} or len(places) > 2):
        [step] = steps
        return f"{places[0]}:{places[-1] + 1}" + f":{step}" * (step > 1)
    if len(places) > 6:
        return f"[{len(places)} of {len(vector)}]"
    return f"[{', '.join(map(str, places))}]"
