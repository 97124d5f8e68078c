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

from lrmult._levels import entries
from lrmult._modules import Segments, members
from lrmult._multipliers import Multiplier


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
    nodes: set[Segments]


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
    paths = [*entries(params)]
    stacked, unclear = watch.stacked(params)
    return Facts(
        order={path: names for path, names in watch.order.items() if path not in unclear},
        groups=watch.groups(paths),
        stacked=stacked,
        nodes={path[:depth] for path in paths for depth in range(len(path))},
    )


class _Watch:
    """Notes what happens when modules are called."""

    def __init__(self, boxed: bool) -> None:
        self.order: dict[Segments, list[str]] = {}
        self._links: dict[Segments, Segments] = {}  # another path of a module -> its own
        self._boxed = boxed
        # The modules that are being called, and the names of their attributes.
        self._calling: list[tuple[Segments, dict[Any, str]]] = []
        # For each array the number of its axes when it was made; and by how many it had got since,
        # the shortest path of a module that returned then.
        self._made: dict[Segments, int] = {}
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
        self._note_call(path, module)
        names: dict[Any, str] = {}
        for name, each in _attributes(module):
            names[id(each)] = name
            if each.scope is not None:  # what is lifted is called as a copy
                names[each.path] = name
        self._calling.append((path, names))
        try:
            result = function(*args, **kwargs)
        finally:
            self._calling.pop()
        for name, each in _attributes(module):
            if each.scope is not None and each.path != (*path, name):
                self._links[(*path, name)] = each.path
        if isinstance(module, nn.Sequential):
            self.order[path] = [f"layers_{number}" for number in range(len(module.layers))]
        self._note_return(path, module)
        return result

    def _note_call(self, path: Segments, module: nn.Module) -> None:
        """Put a module in its place among those that its caller calls."""
        for above, attributes in reversed(self._calling):
            if above == path:  # another method of the same module
                return
            name = attributes.get(id(module), attributes.get(path))
            if above == path[:-1]:
                name = path[-1]
            if name is not None:
                names = self.order.setdefault(above, [])
                if name not in names:
                    names.append(name)
                return

    def _note_return(self, path: Segments, module: nn.Module) -> None:
        for name, value in module.variables.get("params", {}).items():
            if self._boxed and not isinstance(value, Mapping | _Box) and _axes(value) is not None:
                module.put_variable("params", name, _Box(value, (), _axes(value) or 0))
        for names, value in entries(module.variables.get("params", {})).items():
            if (ndim := _axes(value)) is not None:
                array = (*path, *names)
                key = array, ndim - self._made.setdefault(array, ndim)
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

    def stacked(self, params: Any) -> tuple[dict[Segments, int], set[Segments]]:
        """The nodes below which all arrays got an axis that `nn.scan` or `nn.vmap` has added.

        Returns:
            Their axes; and other such nodes, of which it is not clear what a position counts: where
            two were added at once, or what was added could not be seen.
        """
        boxes = dict(_boxes(params))
        axes: dict[Segments, list[set[int]]] = {}
        unclear: set[Segments] = set()
        for names, value in entries(params).items():
            added = (_axes(value) or 0) - self._made.get(names, _axes(value) or 0)
            nodes = [self._returned.get((names, number)) for number in range(added)]
            box = boxes.get(names)
            if None in nodes or len(set(nodes)) < len(nodes) or (added and box is None):
                unclear.update(node for node in nodes if node is not None)
            for node, axis in zip(nodes, box.axes if box is not None else (), strict=False):
                if node is not None:
                    axes.setdefault(node, []).append({axis, axis - (_axes(value) or 0)})
        found = {}
        for node, seen in axes.items():
            below = [names for names in boxes if names[: len(node)] == node]
            fitting = sorted(set.intersection(*seen), reverse=True)
            if len(seen) == len(below) and fitting:
                found[node] = fitting[0]
            else:
                unclear.add(node)
        return {node: axis for node, axis in found.items() if node not in unclear}, unclear


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


class _Key(jax.tree_util.GetAttrKey):  # type: ignore[misc]
    """The key of what is in a box, as modules that look at the paths of their variables read it."""

    @property
    def key(self) -> str:
        return str(self.name)


jax.tree_util.register_pytree_with_keys(
    _Box,
    lambda box: (((_Key("value"), box.value),), (box.added, box.ndim)),
    lambda aux, children: _Box(next(iter(children)), *aux),
)


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


def _axes(value: Any) -> int | None:
    """The number of axes of an array, in boxes or not; None if it is no single array."""
    leaves = jax.tree.leaves(value)
    return len(leaves[0].shape) if len(leaves) == 1 and hasattr(leaves[0], "shape") else None


def _boxes(params: Any, above: Segments = ()) -> Iterator[tuple[Segments, _Box]]:
    for name, value in params.items():
        if isinstance(value, _Box):
            yield (*above, name), value
        elif isinstance(value, Mapping):
            yield from _boxes(value, (*above, name))
