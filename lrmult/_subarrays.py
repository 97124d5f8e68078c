"""Parts of single arrays, read and set as by NumPy, whatever kind of array it is."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from lrmult._errors import spec
from lrmult._paths import shape_and_dtype
from lrmult._scaling import explicit_sharding

# Places along an axis: an int drops the axis.
Places: TypeAlias = int | list[int]


@dataclasses.dataclass(frozen=True)
class SubArray:
    """A part of an array.

    Attributes:
        places: by axis, the places along it, where these are not all in order.
        mask: the elements, in place of that.
    """

    places: Mapping[int, Places] = dataclasses.field(default_factory=dict)
    mask: npt.NDArray[np.bool_] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is the array itself."""
        return not self.places and self.mask is None

    def shape(self, array: Any) -> tuple[int, ...]:
        """The shape of the part."""
        if self.mask is not None:
            return (int(self.mask.sum()),)
        sizes = [self.places.get(axis, [0] * size) for axis, size in enumerate(np.shape(array))]
        return tuple(len(places) for places in sizes if not isinstance(places, int))

    def of(self, array: Any) -> Any:
        """The part of an array."""
        if self.is_whole:
            return array
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(self.shape(array), array.dtype)
        if explicit_sharding(array) is not None:
            mesh = explicit_sharding(array).mesh
            everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            found = array.at[self._index(array)].get(out_sharding=everywhere)
        else:
            found = (array if isinstance(array, jax.Array) else np.asarray(array))[
                self._index(array)
            ]
        return found.reshape(self.shape(array))

    def misfit(self, array: Any, value: Any) -> str | None:
        """Why the part of an array cannot take a value; None if it can."""
        shape, dtype = np.shape(value), dtype_of(value)
        seen = f"cannot take {spec(shape, dtype)}"
        if shape != self.shape(array):
            return f"{seen}: shapes must agree"
        is_shape = [isinstance(each, jax.ShapeDtypeStruct) for each in (array, value)]
        if is_shape[1] and not is_shape[0]:
            return "cannot take a ShapeDtypeStruct, which has no numbers; pass an array"
        if is_shape[0] and not is_shape[1] and not self.is_whole:
            return "is a ShapeDtypeStruct, of which no part can be set"
        if self._names_twice and not any(is_shape) and not self._agrees(array, value):
            return "is named with one place twice, and cannot take two values there"
        if kind_of(dtype_of(array)) != kind_of(dtype):
            return f"{seen}: that is another kind of dtype; cast it first, as with x.astype(...)"
        return None

    @property
    def _names_twice(self) -> bool:
        lists = [places for places in self.places.values() if not isinstance(places, int)]
        return any(len(set(places)) < len(places) for places in lists)

    def _agrees(self, array: Any, value: Any) -> bool:
        """Whether a value has the same wherever one place is named again; False if unknown."""
        if isinstance(value, jax.core.Tracer) or not isinstance(dtype_of(value), np.dtype):
            return False
        given = np.asarray(value).reshape(-1)
        last = np.zeros(np.shape(array), np.intp)
        last[self._index(array)] = np.arange(given.size).reshape(self._sizes(array))
        return bool(given[last[self._index(array)].reshape(-1)].tobytes() == given.tobytes())

    def put(self, array: Any, value: Any) -> Any:
        """A copy of the array with other values in the part, of the same kind and in its place."""
        if isinstance(value, jax.ShapeDtypeStruct):
            return array
        if isinstance(array, jax.ShapeDtypeStruct):
            return jnp.array(value, array.dtype)
        is_traced = any(isinstance(each, jax.core.Tracer) for each in (array, value))
        if not isinstance(array, jax.Array) and not is_traced:
            return self._put_on_host(array, value)
        if self.is_whole and (is_traced or not getattr(array, "weak_type", False)):
            copy = jnp.array(value, dtype_of(array))
            return copy if is_traced else _in_place_of(array, copy)
        array = jnp.asarray(array)
        index = ... if self.is_whole else self._index(array)
        sizes = np.shape(array) if self.is_whole else self._sizes(array)
        if not is_traced:
            value = _beside(array, jnp.asarray(value, array.dtype))
        value = jnp.reshape(jnp.asarray(value, array.dtype), sizes)
        sharding = explicit_sharding(array)
        if sharding is not None:
            copy = array.at[index].set(value, out_sharding=sharding)
        else:
            copy = array.at[index].set(value)
        return copy if is_traced else _in_place_of(array, copy)

    def _put_on_host(self, array: Any, value: Any) -> Any:
        copy = np.array(array)
        if self.is_whole:
            copy[...] = np.asarray(value)
        else:
            copy[self._index(array)] = np.asarray(value).reshape(self._sizes(array))
        if isinstance(array, np.ndarray):
            return copy
        return type(array)(copy[()])  # a number

    def _index(self, array: Any) -> Any:
        """What to index an array with."""
        if self.mask is not None:
            return np.nonzero(self.mask) if self.mask.ndim else None  # a new axis
        lists = {axis: [p] if isinstance(p, int) else p for axis, p in self.places.items()}
        if len(lists) > 1:
            sizes = enumerate(np.shape(array))
            return np.ix_(*[lists.get(axis, list(range(size))) for axis, size in sizes])
        [(axis, places)] = lists.items()
        return (*[slice(None)] * axis, np.array(places, np.intp))

    def _sizes(self, array: Any) -> tuple[int, ...]:
        """The shape of what that gives."""
        if self.mask is not None:
            return self.shape(array)
        lists = {axis: 1 if isinstance(p, int) else len(p) for axis, p in self.places.items()}
        return tuple(lists.get(axis, size) for axis, size in enumerate(np.shape(array)))


def _in_place_of(array: jax.Array, copy: jax.Array) -> Any:
    """Put an array where another one is; one that may go anywhere may go on doing so."""
    if array.committed:
        return jax.device_put(copy, array.sharding)
    if not copy.committed:
        return copy
    if jnp.issubdtype(copy.dtype, jax.dtypes.prng_key):
        data = jnp.asarray(np.asarray(jax.random.key_data(copy)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(copy))
    return jnp.asarray(np.asarray(copy))


def _beside(array: jax.Array, value: jax.Array) -> Any:
    """Put a value, whole, on the devices of an array."""
    sharding = array.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    if array.committed:
        return jax.device_put(value, sharding)
    return _in_place_of(array, value)


def dtype_of(value: Any) -> Any:
    """The dtype of an array or a number."""
    return shape_and_dtype(value)[1]


def kind_of(dtype: Any) -> Any:
    """What dtypes have in common that are cast into one another."""
    kinds = {"float": jnp.floating, "int": jnp.integer, "complex": jnp.complexfloating}
    for name, kind in kinds.items():
        if jnp.issubdtype(dtype, kind):
            return name
    return "bool" if dtype == np.bool_ else dtype
