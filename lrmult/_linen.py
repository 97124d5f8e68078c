"""What needs Linen itself: the order of calls in its modules, and multipliers in its boxes.

Imported only where a user has passed something of Linen's.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
from flax.core import meta

from lrmult._modules import Segments, members
from lrmult._multipliers import Multiplier
from lrmult._paths import entries


class Attached(flax.struct.PyTreeNode, meta.AxisMetadata[Any]):  # type: ignore[no-untyped-call]
    """An array and the multiplier that its initializer was given by `lrmult.attach`."""

    value: Any
    lr_mult: Multiplier = flax.struct.field(pytree_node=False)  # type: ignore[no-untyped-call]

    @classmethod
    def around(cls, value: Any, lr_mult: Multiplier) -> Any:
        """Box the array in a value; boxes that it is in already stand outside."""
        return jax.tree.map(
            lambda leaf: cls(value=leaf.value if isinstance(leaf, cls) else leaf, lr_mult=lr_mult),
            value,
            is_leaf=lambda node: isinstance(node, cls),
        )

    @classmethod
    def from_nnx_metadata(cls, metadata: dict[str, Any]) -> "Attached":
        """Make it of a variable of `flax.nnx.bridge`."""
        return cls(value=metadata["value"], lr_mult=metadata["lr_mult"])

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Attached":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Attached":
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Attached":
        return self

    def get_partition_spec(self) -> Any:
        return jax.sharding.PartitionSpec()

    def __jax_array__(self) -> Any:
        # Some layers of Linen reshape what they find in the outermost box (DenseGeneral).
        return self.value


class Facts(NamedTuple):
    """What the calls of modules tell; see `Structure`."""

    order: dict[Segments, list[str]]
    groups: list[list[Segments]]
    stacked: dict[Segments, int]


def facts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts:
    """Call a module's ``init`` on shapes, and watch which modules call which."""
    try:
        return _watch(module, args, kwargs, boxed=True)
    except Exception:  # a module that reads its variables itself may not know what to do with a box
        return _watch(module, args, kwargs, boxed=False)


def _watch(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, boxed: bool
) -> Facts:
    watch = _Watch(boxed)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    is_traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def init(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        given = [
            next(rest) if traced else leaf for leaf, traced in zip(leaves, is_traced, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(treedef, given)
        with nn.intercept_methods(watch.call):
            return module.init(*args, **kwargs)

    arrays = [leaf for leaf, traced in zip(leaves, is_traced, strict=True) if traced]
    params = jax.eval_shape(init, arrays).get("params", {})
    return Facts(watch.order, watch.groups([*entries(params)]), watch.stacked(params))


class _Watch:
    """Notes what happens when modules are called."""

    def __init__(self, boxed: bool) -> None:
        self.order: dict[Segments, list[str]] = {}
        self._links: dict[Segments, Segments] = {}  # another path of a module -> its own
        self._boxed = boxed
        self._calling: list[tuple[Segments, dict[int, str]]] = []
        # For each array and number of axes that it had got, the shortest path of a module that
        # returned then.
        self._returned: dict[tuple[Segments, int], Segments] = {}

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Any,
    ) -> Any:
        """The interceptor of calls."""
        module = context.module
        path = module.path
        # What lifts a module, such as nn.scan, has the path of the module that calls it.
        is_own = context.method_name != "setup" and module.name in (None, *path[-1:])
        if not is_own:
            return function(*args, **kwargs)
        attributes = dict(_attributes(module))
        self._note_call(path, module)
        self._calling.append((path, {id(each): name for name, each in attributes.items()}))
        try:
            result = function(*args, **kwargs)
        finally:
            self._calling.pop()
        for name, each in _attributes(module):
            if each.scope is not None and each.path != (*path, name):
                self._links[(*path, name)] = each.path
        if isinstance(module, nn.Sequential):
            self.order[path] = [f"layers_{number}" for number in range(len(module.layers))]
        if self._boxed:
            self._note_return(path, module)
        return result

    def _note_call(self, path: Segments, module: nn.Module) -> None:
        """Put a module in its place among those that its caller calls."""
        for above, attributes in reversed(self._calling):
            if above == path:  # another method of the same module
                return
            name = path[-1] if above == path[:-1] else attributes.get(id(module))
            if name is not None:
                names = self.order.setdefault(above, [])
                if name not in names:
                    names.append(name)
                return

    def _note_return(self, path: Segments, module: nn.Module) -> None:
        variables = module.variables.get("params", {})
        for name, value in variables.items():
            if not isinstance(value, Mapping | _Box):
                leaves = jax.tree.leaves(value)
                if len(leaves) == 1:
                    module.put_variable("params", name, _Box(value, (), leaves[0].ndim))
        for names, box in _boxes(module.variables.get("params", {})):
            key = (*path, *names), len(box.added)
            if len(path) <= len(self._returned.get(key, path)):
                self._returned[key] = path

    def groups(self, arrays: list[Segments]) -> list[list[Segments]]:
        """For each array that several paths lead to, its own and the others."""
        found = []
        for array in arrays:
            others = [array]
            # Each link is followed once on the way: a module may hold one that holds it.
            pending = [(array, frozenset[Segments]())]
            while pending:
                path, followed = pending.pop()
                for link, own in self._links.items():
                    if path[: len(own)] == own and link not in followed:
                        other = (*link, *path[len(own) :])
                        if other not in others:
                            others.append(other)
                            pending.append((other, followed | {link}))
            if len(others) > 1:
                found.append(others)
        return found

    def stacked(self, params: Any) -> dict[Segments, int]:
        """The nodes below which all arrays got an axis that `nn.scan` or `nn.vmap` has added."""
        boxes = dict(_boxes(params))
        axes: dict[Segments, list[set[int]]] = {}
        for names, box in boxes.items():
            for number, axis in enumerate(box.axes):
                node = self._returned.get((names, number))
                if node is not None:
                    both = {axis, axis - box.ndim - len(box.added)}
                    axes.setdefault(node, []).append(both)
        found = {}
        for node, seen in axes.items():
            below = [names for names in boxes if names[: len(node)] == node]
            fitting = sorted(set.intersection(*seen), reverse=True)
            if len(seen) == len(below) and fitting:
                found[node] = fitting[0]
        return found


@dataclasses.dataclass(frozen=True)
class _Box(meta.AxisMetadata[Any]):
    """Notes which axes an array gets on its way out of what lifts its module."""

    value: Any
    added: tuple[int, ...]
    ndim: int

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "_Box":
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "_Box":
        return dataclasses.replace(self, added=(*self.added, index))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Box":
        return dataclasses.replace(self, added=self.added[:-1])

    @property
    def axes(self) -> list[int]:
        """The axes that were added, as those of the array as it came out."""
        found: list[int] = []
        for number, index in enumerate(self.added):
            axis = index % (self.ndim + number + 1)
            found = [each + (each >= axis) for each in found] + [axis]
        return found


jax.tree_util.register_dataclass(_Box, ["value"], ["added", "ndim"])


def _attributes(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a module has as attributes, by the names that Linen would give them."""
    for name, value in vars(module).items():
        if name in ("parent", "scope") or name.startswith("_"):
            continue
        if isinstance(value, nn.Module):
            yield name, value
        elif isinstance(value, list | tuple | Mapping):
            inside = members(dict(value) if isinstance(value, Mapping) else value)
            for key, each in inside.items():
                if isinstance(each, nn.Module):
                    yield f"{name}_{key}", each


def _boxes(params: Any, above: Segments = ()) -> Iterator[tuple[Segments, _Box]]:
    for name, value in params.items():
        if isinstance(value, _Box):
            yield (*above, name), value
        elif isinstance(value, Mapping):
            yield from _boxes(value, (*above, name))
