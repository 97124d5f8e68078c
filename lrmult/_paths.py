"""The paths of a parameter tree, in one dialect for every library.

`ParamTree` reads a pytree once: its arrays, what encloses them, and the holes in it. Nothing else
in the package looks at JAX key paths.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from optax import MaskedNode

from lrmult._errors import RuleError, shorten, spec
from lrmult._libraries import box_types, loaded_equinox
from lrmult._patterns import escape

PyTree: TypeAlias = Any
KeyPath: TypeAlias = tuple[Any, ...]


class ParamTree:
    """A pytree read once: its nodes by path, its arrays, and the holes in it.

    A node is an int, parents come before their children, and 0 is the root. What is known of the
    nodes stands in lists of plain texts and ints, which cost Python's garbage collector nothing.

    Attributes:
        treedef: the structure of the tree as JAX sees it.
        names: per node, its segment as the tree has it.
        parents: per node, the node above it.
        children: per node, the nodes below it by name.
        holes: the nodes where something may have been cut out: ``None``, `optax.MaskedNode`.
        cut: those of them where that may be a whole subtree, not only one array. A ``None`` in the
            field of a module is one array: Equinox filters leaf by leaf.
        places: per leaf, its node; None where the leaf is no array, such as an activation function.
        shapes: per leaf, its shape; `()` where it is no array.
        dtypes: per leaf, its dtype; None where it is no array.
        aliases: per leaf that is shared, the other nodes that stand for it.
        order: the nodes whose children are in a given order, and the names of these, among which
            may be layers without parameters that are not in the tree.
        layers: the nodes whose layers are stacked along an axis of every array below, and for each
            of them the nodes that stand for its layers, by number. Only positions lead there.
        slices: per leaf below such nodes, the nodes that stand for slices of it, each with an index
            for some of its axes.
        is_read: whether facts were read from a model, not only given by hand.
    """

    def __init__(self, params: PyTree) -> None:
        self.treedef: Any = None
        self.names: list[str] = [""]
        self.parents: list[int] = [0]
        self.children: list[dict[str, int]] = [{}]
        self.holes: set[int] = set()
        self.cut: set[int] = set()
        self.places: list[int | None] = []
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[Any] = []
        self.aliases: dict[int, list[int]] = {}
        self.order: dict[int, tuple[str, ...]] = {}
        self.is_read = False
        self.layers: dict[int, dict[str, int]] = {}
        self.slices: dict[int, dict[int, dict[int, int]]] = {}
        self._stacked: set[int] = set()  # the nodes that stand for layers
        self._read(params)
        self._size = len(self.names)

    def _read(self, params: PyTree) -> None:
        """Fill the lists. This loop is most of what compiling rules costs."""
        names, parents, children = self.names, self.parents, self.children
        previous: KeyPath = ()
        nodes = [0]  # along the previous path
        found, treedef = _flatten(params, box_types())
        self.treedef = treedef or jax.tree.structure(params)
        for path, value in found:
            shared = 0
            for key, before in zip(path, previous, strict=False):
                if key is not before:  # JAX makes one key for all paths through it
                    break
                shared += 1
            del nodes[shared + 1 :]
            node = nodes[-1]
            for key in path[shared:]:
                field = _FIELDS.get(type(key))  # `_segments_of` in place: this is the inner loop
                name = getattr(key, field) if field else key
                if type(name) is not str:
                    name = str(name)
                for segment in name.split("/") if "/" in name else (name,):
                    below = children[node]
                    child = below.get(segment)
                    if child is None:
                        child = len(names)
                        if below is _CHILDLESS:
                            below = children[node] = {}
                        below[segment] = child
                        names.append(segment)
                        parents.append(node)
                        children.append(_CHILDLESS)
                    node = child
                nodes.append(node)
            previous = path
            if value is None or type(value) is MaskedNode:
                self.holes.add(node)
                if value is not None or not path or type(path[-1]) is not jax.tree_util.GetAttrKey:
                    self.cut.add(node)
                continue
            shape, dtype = shape_and_dtype(value)
            self.shapes.append(shape)
            self.dtypes.append(dtype)
            self.places.append(None if dtype is None else node)
        self._check_paths()

    def _check_paths(self) -> None:
        arrays = [node for node in self.places if node is not None]
        if len(set(arrays)) < len(arrays):
            [(twice, _)] = collections.Counter(arrays).most_common(1)
            raise RuleError(
                f"two arrays of the tree have the path {shorten(self.text(twice))!r} (a '/' inside "
                "a key separates segments too); rename one of the keys"
            )
        for below in filter(None, map(self.children.__getitem__, arrays)):
            child = next(iter(below.values()))
            raise RuleError(
                f"the tree has an array at {shorten(self.text(self.parents[child]))!r} and another "
                f"below it, at {shorten(self.text(child))!r}, so no text names the first alone; "
                "rename a key"
            )

    def node_at(self, segments: Iterable[str]) -> int | None:
        """The node that a path leads to; None if there is none."""
        names = tuple(segments)
        line = list(self.nodes_along(names))
        return line[-1] if len(line) > len(names) else None

    def nodes_along(self, segments: Iterable[str]) -> Iterator[int]:
        """The nodes on a path from the root, as far as there are any."""
        node = 0
        yield node
        for segment in segments:
            if segment not in self.children[node]:
                return
            node = self.children[node][segment]
            yield node

    def layers_with_outputs_first(self) -> dict[int, int]:
        """The nodes that are linear or convolutional layers of Equinox, if it is imported.

        Their arrays alone would not tell them from an embedding, or from a stack of layers.

        Returns:
            For each, the number of axes of its weight.
        """
        nn = getattr(loaded_equinox(), "nn", None)
        if nn is None:
            return {}
        linear, convolution = nn.Linear, (nn.Conv, nn.ConvTranspose)
        skeleton = self.treedef.unflatten([None] * self.treedef.num_leaves)
        modules = jax.tree_util.tree_flatten_with_path(
            skeleton, is_leaf=lambda node: isinstance(node, (linear, *convolution))
        )[0]
        found: dict[int, int] = {}
        for path, module in modules:
            node = self.node_at(itertools.chain.from_iterable(map(_segments_of, path)))
            if node is not None:
                found[node] = 2 if isinstance(module, linear) else module.num_spatial_dims + 2
        return found

    def alias(self, leaf: int, segments: Iterable[str]) -> None:
        """Note that a path leads to an array that stands elsewhere in the tree."""
        node = 0
        for segment in segments:
            below = self.children[node]
            if segment not in below:
                if below is _CHILDLESS:
                    below = self.children[node] = {}
                below[segment] = len(self.names)
                self.names.append(segment)
                self.parents.append(node)
                self.children.append(_CHILDLESS)
            node = below[segment]
        self._size = len(self.names)
        self.aliases.setdefault(leaf, []).append(node)

    def stack(self, node: int, axis: int, size: int) -> None:
        """Note that a node stands for that many layers, stacked along an axis of all below it.

        Each layer becomes a copy of the node and of what is below it. Where such nodes stand above
        one another, the lower ones come first.
        """
        leaves: dict[int, list[int]] = {}  # by node: two leaves may be declared one array
        for leaf, place in self.arrays():
            for each in (place, *self.aliases.get(leaf, ()), *self.slices.get(leaf, ())):
                leaves.setdefault(each, []).append(leaf)
        layers: dict[str, int] = {}
        for number in range(size):
            self._copy(node, (layers, str(number)), leaves, (axis, number))
        for key, layer in layers.items():
            self.names[layer] = key
            self._stacked.add(layer)
        self.layers[node] = layers

    def stack_below(self, node: int, top: int) -> None:
        """Note that a node holds all arrays of a stack above it: its layers are the same."""
        names = [self.names[each] for each in self.line(node)[len(self.line(top)) :]]
        self.layers[node] = {}
        for number, layer in self.layers[top].items():
            self.layers[node][number] = functools.reduce(
                lambda above, name: self.children[above][name], names, layer
            )

    def _copy(
        self,
        top: int,
        link: tuple[dict[str, int], str],
        leaves: dict[int, list[int]],
        at: tuple[int, int],
    ) -> None:
        pending = [(top, top, link)]
        while pending:
            node, above, (siblings, name) = pending.pop()
            copy = siblings[name] = len(self.names)
            self.names.append(self.names[node])
            self.parents.append(above)
            for leaf in leaves.get(node, ()):
                slices = self.slices.setdefault(leaf, {})
                axis = at[0] % len(self.shapes[leaf])
                slices[copy] = {**slices.get(node, {}), axis: at[1]}
            for known in (self.holes, self.cut, self._stacked):
                if node in known:
                    known.add(copy)
            if node in self.order:
                self.order[copy] = self.order[node]
            below: dict[str, int] = {}
            self.children.append(below)
            pending.extend(
                (child, copy, (below, key)) for key, child in self.children[node].items()
            )
            if node in self.layers:
                layers = self.layers[copy] = {}
                pending.extend(
                    (child, copy, (layers, key)) for key, child in self.layers[node].items()
                )

    def without_layers(self, node: int) -> int:
        """The node that a node below a layer of a stack is a copy of."""
        names = [self.names[each] for each in self.line(node)[1:] if each not in self._stacked]
        found = self.node_at(names)
        return node if found is None else found

    def text(self, node: int) -> str:
        """The path of a node, as it is written in a rule."""
        text = ""
        for each in self.line(node)[1:]:
            if each in self._stacked:
                text += f"[{self.names[each]}]"
            else:
                text += ("/" if text else "") + escape(self.names[each])
        return text

    def path(self, leaf: int) -> str:
        """The path of an array."""
        return self.text(self.places[leaf] or 0)

    def raw_text(self, node: int) -> str:
        """The path with nothing escaped: what a regular expression sees."""
        return "/".join(self.names[each] for each in self.line(node)[1:])

    def line(self, node: int) -> list[int]:
        """The nodes from the root down to a node."""
        found = [node]
        while node:
            node = self.parents[node]
            found.append(node)
        return found[::-1]

    def show(self, leaf: int) -> str:
        """How a message shows an array: ``'head/bias' float32[10]``."""
        path = shorten(self.path(leaf))
        return (f"{path!r} " if path else "the array ") + spec(self.shapes[leaf], self.dtypes[leaf])

    @property
    def nodes(self) -> range:
        """The nodes of the tree itself, without those that stand for layers."""
        return range(self._size)

    def arrays(self) -> Iterator[tuple[int, int]]:
        """The index and the node of each leaf that is an array."""
        for index, node in enumerate(self.places):
            if node is not None:
                yield index, node


# Where the keys of a JAX key path say what they are called.
_FIELDS = {
    jax.tree_util.DictKey: "key",
    jax.tree_util.FlattenedIndexKey: "key",
    jax.tree_util.GetAttrKey: "name",
    jax.tree_util.SequenceKey: "idx",
}
_CHILDLESS: dict[str, int] = {}  # shared by all nodes that have no children, and never written to


def _segments_of(key: Any) -> tuple[str, ...] | list[str]:
    """What one key of a JAX key path adds to a path."""
    field = _FIELDS.get(type(key))
    name = getattr(key, field) if field else key
    if type(name) is not str:
        name = str(name)
    return name.split("/") if "/" in name else (name,)


def paths(params: PyTree) -> list[str]:
    r"""List the path of every array in a parameter tree, as it is written in a rule.

    Segments are joined by ``/`` and ints are written as they are, whatever library made the tree:
    Flax Linen, NNX (a module, its state, or the raw arrays that an optimizer sees), Equinox, Haiku,
    or plain containers. Boxes around arrays (an NNX ``Variable``, a Linen ``Partitioned``) do not
    show, keys that hold a ``/`` are split, and characters that mean something in a rule are escaped
    with a backslash: any of these texts used as a target selects that array and nothing else.

    Args:
        params: a pytree of arrays, or of anything with ``shape`` and ``dtype`` such as
            `jax.ShapeDtypeStruct`.

    Returns:
        One text per array, in the order of `jax.tree.leaves`. A bare array has the path ``""``,
        which no text names: the target ``...`` reaches it.

    Raises:
        RuleError: if two arrays have one path.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"layers": [{"w": jnp.ones(3)}, {"w": jnp.ones(3)}], "gain*": jnp.ones(())}
        >>> for path in lm.paths(params):
        ...     print(path)
        gain\*
        layers/0/w
        layers/1/w
    """
    tree = ParamTree(params)
    return [tree.text(node) for _, node in tree.arrays()]


def shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """The shape and dtype of an array or a number; the dtype is None for any other object."""
    try:
        return leaf.shape, leaf.dtype
    except AttributeError:
        is_number = isinstance(leaf, bool | int | float | complex)
        return (), jnp.result_type(leaf) if is_number else None


def is_array(leaf: Any) -> bool:
    """Whether something is an array or a number."""
    return shape_and_dtype(leaf)[1] is not None


def children_of(node: PyTree) -> dict[tuple[str, ...], Any]:
    """What stands directly below a node of a pytree, by the names on the way; boxes do not show."""
    if isinstance(node, box_types()):
        [(_, node)] = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: n is not node)[0]
    found = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: n is not node)[0]
    return {tuple(_segments_of(keys[0])): child for keys, child in found if keys}


def entries(tree: PyTree) -> dict[tuple[str, ...], Any]:
    """All that stands in a pytree, by the names along its path, in the order of its leaves.

    Holes and containers without children are among it.
    """
    found, _ = _flatten(tree, box_types(), (tuple, list, dict))
    return {
        tuple(itertools.chain.from_iterable(map(_segments_of, path))): value
        for path, value in found
    }


def _flatten(
    tree: PyTree, boxes: tuple[type, ...], empty: tuple[type, ...] = ()
) -> tuple[Iterable[tuple[KeyPath, Any]], Any]:
    """Flatten with paths; holes are kept, and boxes leave no trace in the path.

    Args:
        tree: the tree.
        boxes: the classes of boxes.
        empty: the classes of containers that are kept where they have no children.

    Returns:
        Paths and values, and the structure of the tree; None in its place if there are holes or
        boxes, which JAX does not take for leaves.
    """
    stop = (type(None), MaskedNode, *boxes)
    found, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, stop) or (isinstance(node, empty) and not node)
    )
    kinds = {type(value) for _, value in found}
    if not any(issubclass(kind, stop) for kind in kinds):
        return found, treedef
    if not any(issubclass(kind, boxes) for kind in kinds):
        return found, None
    unboxed = itertools.chain.from_iterable(
        _unbox(path, value, boxes, empty) if isinstance(value, boxes) else [(path, value)]
        for path, value in found
    )
    return unboxed, None


def _unbox(
    path: KeyPath, box: Any, boxes: tuple[type, ...], empty: tuple[type, ...]
) -> Iterator[tuple[KeyPath, Any]]:
    children = jax.tree_util.tree_flatten_with_path(box, is_leaf=lambda node: node is not box)[0]
    for keys, child in children:
        if not keys:  # a box that JAX does not know
            yield path, child
            continue
        [key] = keys
        # Only the attribute of a box is dropped: attention has a real layer called "value".
        owned = isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"
        inner = path if owned else (*path, key)
        for below, leaf in _flatten(child, boxes, empty)[0]:
            yield (*inner, *below), leaf
