"""One array as a plan has it: scaled, told apart in what is frozen and what trains, or cut out.

Constants stay as small as an axis, or one bit per element.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lrmult._claims import Pieces
from lrmult._multipliers import Dynamic, Multiplier
from lrmult._parts import Parts, values_of
from lrmult._regions import WHOLE, Bools, FirstMatch, Mask, Region, Shape, spread

# Longer vectors are no constants of a compiled program as they stand.
_LONG = 2**15


class _Line(NamedTuple):
    """A long vector of numbers, many of which are the same.

    Attributes:
        distinct: numbers, along the axis of the vector.
        places: where each but the first begins (int32), if each stands in one run; or which of them
            stands at each place, as the bits of its number: a vector of packed ones for each digit.
    """

    distinct: Any
    places: Any


class Scale(NamedTuple):
    """What the elements of a region are multiplied by; None if they are frozen."""

    region: Region
    factor: float | Dynamic | np.ndarray[Any, Any] | _Line | None


# The first that holds an element counts; together they hold all elements.
Scales: TypeAlias = tuple[Scale, ...]


class Box(NamedTuple):
    """The smallest part of an array, by places along axes, that holds all that trains.

    Attributes:
        vectors: for each axis along which places are left out, which are in it.
        all_trains: whether nothing in it is frozen.
    """

    vectors: dict[int, Bools]
    all_trains: bool

    def size(self, shape: Shape) -> Shape:
        """The shape of what lies in it."""
        vectors = self.vectors
        return tuple(int(vectors[a].sum()) if a in vectors else n for a, n in enumerate(shape))


class Value(NamedTuple):
    """A schedule or an array at run time.

    Attributes:
        factor: a scalar.
        is_zero: whether it selects zero; None where it multiplies, whatever it is.
    """

    factor: Any
    is_zero: Any = None


def scales_of(shape: Shape, pieces: Pieces, multipliers: Sequence[Multiplier]) -> Scales:
    """How an array is scaled, as far as that is known before run time."""
    values = values_of(shape, pieces, multipliers)
    if isinstance(values, float):
        return (Scale(WHOLE, values or None),)
    scales = [Scale(p.region, m) for p, m in zip(pieces, multipliers, strict=True)]  # type: ignore[arg-type]
    if isinstance(values, Parts):
        return tuple(scales)
    frozen = values == 0
    distinct = np.unique(values[~frozen])
    if 1 < len(distinct) <= 4 and values.size > _LONG // 4:
        return tuple(scales)  # by vectors of bools
    axis = int(np.argmax(values.shape))
    factor: Any = float(distinct[0]) if len(distinct) else 1.0
    if len(distinct) > 1:
        factor = np.where(frozen, 1.0, values)
        factor = _line_of(factor) if factor.size > _LONG // 4 else factor
    rest = Scale(WHOLE, factor)
    if not frozen.any():
        return (rest,)
    return (Scale(WHOLE.along(axis, frozen.reshape(-1)), None), rest)


def scale(
    update: Any, scales: Scales, values: Mapping[int, Value], packed: Mapping[Mask, Any]
) -> Any:
    """The update of an array, scaled; its dtype stays what it is.

    Args:
        update: the update.
        scales: how it is scaled.
        values: the schedules and arrays among the multipliers, by `Dynamic.number`.
        packed: the bits of each element mask.
    """
    factor = scales[0].factor
    is_whole = scales[0].region.is_whole
    if is_whole and isinstance(factor, float) and factor == 1:
        return update
    dtype = getattr(update, "dtype", None)
    if dtype is None:
        update = jnp.asarray(update)
        dtype = update.dtype
    if is_opaque(update):
        return update
    # Outside a trace one compiled call costs a fraction of the operations that it is made of.
    eager = isinstance(update, jax.Array) and not isinstance(update, jax.core.Tracer)
    if is_whole and factor is None:
        return _no_update_eagerly(update) if eager else _no_update(update)
    if is_whole and isinstance(factor, float):
        if not jnp.issubdtype(dtype, jnp.inexact):
            return update
        return _times_eagerly(update, factor) if eager else _times(update, factor)
    # Derivatives with respect to what is known at run time only, a schedule's parameters included.
    differentiable = len(scales) > 1 and any(isinstance(s.factor, Dynamic) for s in scales)
    parts = [_part(s, dtype, values, packed) for s in scales]
    scaled = _scale(update, parts, differentiable)
    if isinstance(update, np.ndarray | np.generic) and not isinstance(scaled, jax.core.Tracer):
        return np.asarray(scaled, dtype)  # JAX may know no float64, which NumPy does
    return scaled


def is_opaque(array: Any) -> bool:
    """Whether an array cannot be computed with: float0 holds no bits, and keys are no numbers."""
    dtype = jnp.result_type(array) if not hasattr(array, "dtype") else array.dtype
    return bool(dtype == jax.dtypes.float0 or jnp.issubdtype(dtype, jax.dtypes.extended))


def is_frozen(scales: Scales) -> bool:
    """Whether the whole of an array is."""
    return all(scale.factor is None for scale in scales)


def box_of(shape: Shape, scales: Scales) -> Box:
    """The box of what trains."""
    if math.prod(shape) == 0 or all(scale.factor is not None for scale in scales):
        return Box({}, all_trains=True)
    trains = [scale.factor is not None for scale in scales]
    match = FirstMatch(shape, [scale.region for scale in scales])
    box = Box(match.box(trains).vectors, all_trains=False)
    trained = sum(itertools.compress(match.counts, trains))
    return box._replace(all_trains=trained == math.prod(box.size(shape)))


def select(scales: Scales, packed: Mapping[Mask, Any], if_frozen: Any, if_trained: Any) -> Any:
    """An array that is one where it is frozen, and another where it trains."""
    frozen = [scale.factor is None for scale in scales]
    if all(frozen):
        return if_frozen
    if not any(frozen):
        return if_trained
    pairs = [
        Scale(s.region, None if still else 1.0) for s, still in zip(scales, frozen, strict=True)
    ]
    dtype = if_trained.dtype
    return _select([_part(pair, dtype, {}, packed) for pair in pairs], if_frozen, if_trained)


def cut(array: Any, box: Box) -> Any:
    """What lies in a box."""
    for axis, vector in box.vectors.items():
        array = _unsharded(array, axis)
        first, last, step = _steps(vector)
        if step:
            array = jax.lax.slice_in_dim(array, first, last + 1, step, axis)
        else:
            array = _gather(array, _places(vector), axis)
    return array


def put_back(array: Any, box: Box, like: Any) -> Any:
    """An array like another in which something lies in a box; what is outside is unspecified."""
    if not box.vectors:
        return array
    if isinstance(array, jax.core.Tracer) and jnp.issubdtype(array.dtype, jnp.inexact):
        array = jax.lax.platform_dependent(array, cpu=_computed_apart, default=lambda each: each)
    for axis, vector in box.vectors.items():
        first, last, step = _steps(vector)
        if step:
            edges = [(0, 0, 0)] * array.ndim
            edges[axis] = (first, vector.size - 1 - last, step - 1)
            array = jax.lax.pad(array, np.zeros((), array.dtype), edges)
        else:
            # To gather from where each place comes is faster than to scatter.
            array = _gather(array, _sources(vector), axis)
    return _sharded_as(like, array)


class _Part(NamedTuple):
    """A `Scale` with its values filled in: a pytree, so that one compiled function serves many."""

    vectors: dict[int, Any]
    packed: tuple[Any, ...]
    factor: Any
    is_zero: Any


def _part(
    scale: Scale, dtype: Any, values: Mapping[int, Value], packed: Mapping[Mask, Any]
) -> _Part:
    factor: Any = scale.factor
    is_zero = None
    if isinstance(factor, Dynamic):
        factor, is_zero = values[factor.number]
    if not isinstance(factor, float | None):
        real = _computed_in(dtype)
        factor = (
            factor._replace(distinct=factor.distinct.astype(real))
            if isinstance(factor, _Line)
            else factor.astype(real)
        )
    vectors = {axis: _compact(vector) for axis, vector in scale.region.vectors.items()}
    masks = tuple([packed[mask] for mask in scale.region.masks])
    return _Part(vectors, masks, factor, is_zero)


def _compact(vector: Bools) -> np.ndarray[Any, Any]:
    """A boolean vector as it is, or if it is long: the edges of its few runs (int32), or bits."""
    if vector.size <= _LONG:
        return vector
    edges = np.flatnonzero(np.diff(vector, prepend=False, append=False))
    return edges.astype(np.int32) if len(edges) <= 16 else np.packbits(vector)


def _line_of(values: np.ndarray[Any, Any]) -> Any:
    axis, line = int(np.argmax(values.shape)), values.reshape(-1)
    places: Any = np.flatnonzero(line[1:] != line[:-1]) + 1
    if len(places) < line.size // 32:
        distinct = line[np.append(0, places)]
        places = places.astype(np.int32)
    else:
        distinct, numbers = np.unique(line, return_inverse=True)
        digits = range(int(len(distinct) - 1).bit_length())
        places = tuple([np.packbits(numbers >> digit & 1 == 1) for digit in digits])
    return _Line(spread(distinct, axis, values.ndim), places)


def _factor(factor: Any, shape: Shape) -> Any:
    """What multiplies an array of some shape."""
    if not isinstance(factor, _Line):
        return factor
    axis, places = int(np.argmax(factor.distinct.shape)), factor.places
    if isinstance(places, tuple):
        bits = [_unpacked(packed, shape[axis]).astype(np.int32) for packed in places]
        number = sum(bit << digit for digit, bit in enumerate(bits))
    else:
        at = jax.lax.iota(np.int32, shape[axis])
        number = jnp.searchsorted(places, at, side="right", method="scan_unrolled")
    line: Any = jnp.take(factor.distinct.reshape(-1), number, mode="clip")
    return spread(line, axis, len(shape))


def _expanded(vector: Any, size: int) -> Any:
    if vector.dtype == np.uint8:
        return _unpacked(vector, size)
    if vector.dtype == np.bool_:
        return vector
    place = jax.lax.iota(np.int32, size)
    return functools.reduce(jnp.logical_xor, [place >= edge for edge in vector])


def _computed_in(dtype: Any) -> Any:
    """The real dtype in which products with an array of some dtype are taken."""
    wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    real = np.zeros((), dtype).real.dtype if wide else np.dtype(np.float32)
    return jax.dtypes.canonicalize_dtype(real)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _scale(update: Any, parts: Sequence[_Part], differentiable: bool) -> Any:
    factor: Any = 1.0
    zero: Any = False
    for part in reversed(parts):
        frozen = part.factor is None
        selects = True if frozen else False if part.is_zero is None else part.is_zero
        here, own = _here(part, update.shape), _factor(part.factor, update.shape)
        if here is None:
            factor, zero = (1.0 if frozen else own), selects
            continue
        if not frozen:
            factor = jnp.where(here, own, factor)
        if zero is not False or selects is not False:
            zero = jnp.where(here, selects, zero)
    factor, zero = _sharded_as(update, factor), _sharded_as(update, zero)
    scaled = update
    if jnp.issubdtype(update.dtype, jnp.inexact):
        if differentiable and zero is not False:
            # The derivative with respect to a factor sums over all elements that it multiplies: a
            # NaN among the frozen ones must not be among them.
            scaled = jnp.where(zero, jnp.zeros_like(update), update)
        scaled = _times(scaled, factor)
    return scaled if zero is False else jnp.where(zero, _no_update(update), scaled)


@functools.partial(jax.jit, inline=True)
def _select(parts: Sequence[_Part], if_frozen: Any, if_trained: Any) -> Any:
    frozen: Any = False
    for part in reversed(parts):
        here = _here(part, if_trained.shape)
        still = part.factor is None
        frozen = still if here is None else jnp.where(here, still, frozen)
    return jnp.where(_sharded_as(if_trained, frozen), if_frozen, if_trained)


def _computed_apart(array: Any) -> Any:
    """The same array, which XLA's CPU backend does not fuse with what it is put back into.

    It would read the parameter, for weight decay, in the loop that adds to it; and as that loop
    reads places other than the one that it writes, it would copy the parameter first. Barriers do
    not keep it from that, but loops do. To negate twice changes no bit.
    """
    return jax.lax.fori_loop(0, 2, lambda _, each: -each, array)


def _steps(vector: Bools) -> tuple[int, int, int]:
    """The first and the last true place, and the step between them; 0 if it is not always one."""
    places = np.flatnonzero(vector)
    steps = np.unique(np.diff(places))
    step = 1 if len(places) == 1 else int(steps[0]) if len(steps) == 1 else 0
    return int(places[0]), int(places[-1]), step


def _places(vector: Bools) -> Any:
    """The true places of a vector."""
    places = np.flatnonzero(vector)
    if places.size <= _LONG // 4:
        return places.astype(np.int32)
    return jnp.nonzero(_expanded(_compact(vector), vector.size), size=places.size)[0]


def _sources(vector: Bools) -> Any:
    """For each place of a vector, how many true ones come before it, if it is true."""
    if vector.size <= _LONG // 4:
        return np.maximum(np.cumsum(vector) - 1, 0).astype(np.int32)
    return jnp.maximum(jnp.cumsum(_expanded(_compact(vector), vector.size)) - 1, 0)


def _gather(array: Any, places: Any, axis: int) -> Any:
    return jnp.take(array, places, axis, mode="clip", indices_are_sorted=True)


def _sharded_as(array: Any, values: Any) -> Any:
    """Values of the array's own shape, sharded as it is where shardings are part of types."""
    sharding = explicit_sharding(array)
    if sharding is None or np.shape(values) != array.shape:
        return values
    return jax.sharding.reshard(values, sharding)


def _unsharded(array: Any, axis: int) -> Any:
    """The array, along one axis on each device whole, where shardings are part of types."""
    sharding = explicit_sharding(array)
    if sharding is None or sharding.spec[axis] is None:
        return array
    spec = [None if each == axis else name for each, name in enumerate(sharding.spec)]
    return jax.sharding.reshard(array, sharding.update(spec=jax.sharding.PartitionSpec(*spec)))


def explicit_sharding(array: Any) -> Any:
    """The sharding of an array, where it is part of its type."""
    sharding = jax.typeof(array).sharding
    return sharding if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types else None


def _here(part: _Part, shape: Shape) -> Any:
    """Where a part lies, in a shape that broadcasts; None if it is the whole array."""
    found: Any = None
    for axis, vector in part.vectors.items():
        along = spread(_expanded(vector, shape[axis]), axis, len(shape))
        found = along if found is None else jnp.logical_and(found, along)
    for bits in part.packed:
        mask = _unpacked(bits, shape[-1])
        found = mask if found is None else jnp.logical_and(found, mask)
    return found


def _unpacked(bits: Any, size: int) -> Any:
    """Booleans from bytes of eight along the last axis, as `numpy.packbits` packs them."""
    # XLA's CPU backend runs this form at the speed of memory; to shift the bytes by a vector of
    # eight takes four times as long as the whole of adamw.
    repeated = jnp.broadcast_to(jnp.expand_dims(bits, -1), (*bits.shape, 8))
    line = repeated.reshape(*bits.shape[:-1], -1)[..., :size]
    place = jax.lax.broadcasted_iota(np.int32, (1,) * (line.ndim - 1) + (size,), line.ndim - 1)
    return line & (np.uint8(128) >> (place & 7).astype(np.uint8)) != 0


def _times(update: Any, factor: Any) -> Any:
    if isinstance(factor, float) and factor == 1:
        return update
    if update.dtype.itemsize < 4:
        return (update.astype(jnp.float32) * factor).astype(update.dtype)
    if jnp.iscomplexobj(update) and not isinstance(factor, float):
        factor = jnp.asarray(factor).astype(update.dtype)
    return update * factor


def _no_update(update: Any) -> Any:
    """What leaves every bit of a parameter as it is when it is added."""
    zero: complex = 0
    if jnp.issubdtype(update.dtype, jnp.inexact):
        is_complex = jnp.issubdtype(update.dtype, jnp.complexfloating)
        zero = complex(-0.0, -0.0) if is_complex else -0.0
    like = np if isinstance(update, np.ndarray | np.generic) else jnp
    return like.full_like(update, zero)


_times_eagerly = jax.jit(_times)


@jax.jit
def _no_update_eagerly(update: Any) -> Any:
    # The result must hang on the update, or a sharded one would give a replicated result.
    zeros = _no_update(update)
    return jnp.where(jax.lax.optimization_barrier(update) == update, zeros, zeros)
