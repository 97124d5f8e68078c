"""What the elements of an array get, where that is not one number for all."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lrmult._claims import Piece, Pieces
from lrmult._errors import RuleError
from lrmult._multipliers import Multiplier, is_schedule, is_static, show_multiplier
from lrmult._regions import WHOLE, Region, Shape, along_one_axis, show_vector, spread

# A number for all elements, numbers along one axis in a shape that broadcasts, or any mixture.
Values: TypeAlias = "float | np.ndarray[Any, Any] | Parts"


class Parts:
    """What the parts of one array get, where several axes, masks, schedules or arrays mix.

    Attributes:
        shape: the shape of the array.
        pairs: regions and what they get; the first region that holds an element counts. A region
            has `vectors` (for each axis that matters a boolean vector along it), `masks`, and
            ``dense(shape)``. What it gets is a float (0.0 if frozen; in `Plan.frozen` a bool), a
            schedule, or a JAX array of one number.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> rules = [(lm.rows("w", 0), None), (lm.along("w", 1, [0, 1]), 3)]
        >>> parts = lm.compile_rules(rules, {"w": jnp.ones((2, 4))}).multipliers["w"]
        >>> parts
        Parts([0, :] frozen; [:, 0:2] 3; rest 1)
        >>> parts.dense()
        array([[0., 0., 0., 0.],
               [3., 3., 1., 1.]])
    """

    def __init__(self, shape: Shape, pairs: Iterable[tuple[Region, Any]], text: str) -> None:
        self.shape = shape
        self.pairs = tuple(pairs)
        self._text = text

    def dense(self, step: Any = None) -> Any:
        """What every element gets, as an array of the array's shape.

        Args:
            step: the number of updates so far, for schedules.

        Raises:
            RuleError: if there are schedules, and no step is given.
        """
        values = []
        for _, value in self.pairs:
            if is_schedule(value):
                if step is None:
                    raise RuleError(
                        f"the {show_multiplier(value)} depends on the step; write dense(step)"
                    )
                value = value(step)
            values.append(value)
        like: Any = jnp if any(isinstance(v, jax.core.Tracer) for v in values) else np
        dtype: Any = bool if all(isinstance(value, bool) for value in values) else float
        dense = like.zeros(self.shape, dtype)
        for (region, _), value in zip(reversed(self.pairs), reversed(values), strict=True):
            value = like.asarray(value).astype(dense.dtype)
            dense = like.where(region.dense(self.shape), value, dense)
        return dense

    def __repr__(self) -> str:
        return f"Parts({self._text})"


def values_of(shape: Shape, pieces: Pieces, values: Sequence[Multiplier]) -> Values:
    """What the elements of an array get, in its simplest form.

    Args:
        shape: the shape of the array.
        pieces: who has which elements; at least one piece.
        values: what each piece gets.
    """
    static = [value or 0.0 for value in values if is_static(value)]
    if len(static) == len(values):
        if len(set(static)) == 1:
            return static[0]
        line = along_one_axis(shape, [piece.region for piece in pieces], static)
        if line:
            along = spread(line[1], line[0], len(shape))
            along.setflags(write=False)  # all arrays with this answer share it
            return along
    pairs = [
        (piece.region, (value or 0.0) if is_static(value) else value)
        for piece, value in zip(pieces, values, strict=True)
    ]
    return Parts(shape, pairs, describe(shape, pieces, map(show_multiplier, values)))


def frozen_of(shape: Shape, pieces: Pieces, frozen: Sequence[bool]) -> "bool | Any":
    """Which elements of an array are frozen, in the simplest form."""
    values = values_of(shape, pieces, [None if each else 1.0 for each in frozen])
    if not isinstance(values, Parts):
        return values == 0
    text = describe(shape, pieces, ["frozen" if each else "trains" for each in frozen])
    return Parts(shape, [(region, value == 0) for region, value in values.pairs], text)


_MOST_PIECES = 4
_MOST_RUNS = 6


def describe(
    shape: Shape, pieces: Pieces, texts: Iterable[str], stacked: Iterable[int] = ()
) -> str:
    """What the parts of an array get, on one line: ``[:, 0:3] frozen; rest 0.1``."""
    merged = _merged(shape, [*zip(pieces, texts, strict=True)])
    shown = []
    for piece, text in merged:
        place = _place(shape, piece.region, piece.count, set(stacked))
        colon = ":" * (place[-1:].isdigit() and text[:1].isdigit())  # layer 11 of 12: 2
        shown.append(f"{place}{colon} {text}".strip())
    if len(merged) > 1 and merged[-1][0].region.is_whole:
        shown[-1] = f"rest {shown[-1]}"
    if len(shown) > _MOST_PIECES + 1:
        left = len(shown) - _MOST_PIECES
        shown = [*shown[: _MOST_PIECES - 1], f"{left} more parts", shown[-1]]
    return "; ".join(shown)


def _merged(shape: Shape, shown: list[tuple[Piece, str]]) -> list[tuple[Piece, str]]:
    """Pieces along one axis without overlap, those that are shown alike as one."""
    axes = {axis for piece, _ in shown for axis in piece.region.vectors}
    if len(axes) != 1 or any(piece.region.masks for piece, _ in shown):
        return shown
    [axis] = axes
    free = np.ones(shape[axis], np.bool_)
    lines: dict[str, Any] = {}
    for piece, text in shown:
        fresh = free & piece.region.vectors.get(axis, True)
        free = free & ~fresh
        lines[text] = lines.get(text, False) | fresh
    last, rest = shown[-1]
    merged = [
        (Piece(None, WHOLE.along(axis, line)), text)
        for text, line in lines.items()
        if text != rest or not last.region.is_whole
    ]
    return [*merged, (Piece(None), rest)] if last.region.is_whole else merged


def _place(shape: Shape, region: Region, count: int | None, stacked: set[int]) -> str:
    if region.is_whole:
        return ""
    if region.masks:
        return f"{count:,} of {math.prod(shape):,} elements"
    if len(region.vectors) == 1 and stacked >= set(region.vectors):
        [(axis, vector)] = region.vectors.items()
        return f"{_layers(np.flatnonzero(vector).tolist())} of {shape[axis]}"
    ends = [":"] * len(shape)
    for axis, vector in region.vectors.items():
        ends[axis] = show_vector(vector)
    return ends[0] if ends[0].startswith("[") and len(ends) == 1 else f"[{', '.join(ends)}]"


def _layers(numbers: list[int]) -> str:
    """Layers by number: ``layers 0-3, 7``."""
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    if len(starts) > _MOST_RUNS:
        return f"{len(numbers)} layers"
    runs = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return f"layers {', '.join(runs)}"
