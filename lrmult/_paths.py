"""The paths of a parameter tree, in one dialect for every library.

`ParamTree` reads a pytree once: its arrays, what encloses them, and the holes in it.
"""

import collections
import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lrmult._errors import RuleError, shorten, spec
from lrmult._levels import PyTree, Reading, entries, read, split_name
from lrmult._libraries import loaded_equinox
from lrmult._patterns import escape

Flat: TypeAlias = tuple[Sequence[Any], Any]  # the leaves of a tree, and its structure


class ParamTree:
    """A pytree read once: its nodes by path, its arrays, and the holes in it.

    A node is an int, parents come before their children, and 0 is the root. What is known of the
    nodes stands in lists of plain texts and ints, which cost Python's garbage collector nothing.

    Attributes:
        treedef: the structure of the tree as JAX sees it.
        names: per node, its segment as the tree has it.
        parents: per node, the node above it.
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

    def __init__(self, params: PyTree, flat: Flat | None = None) -> None:
        """Read a tree; `flat` is what `jax.tree.flatten` made of it, where that is at hand."""
        leaves, self.treedef = flat or jax.tree.flatten(params)
        self.names: list[str] = [""]
        self.parents: list[int] = [0]
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
        self._children: list[dict[str, int]] | None = None
        self._read(params, leaves)
        self._size = len(self.names)

    def _read(self, params: PyTree, leaves: Sequence[Any]) -> None:
        reading = read(params)
        self.names, self.parents = reading.names, reading.parents
        self.holes, self.cut, ends = reading.holes, reading.cut, reading.ends
        if self.holes:
            ends = [end for end in ends if end not in self.holes]
        if not reading.is_plain:
            nodes = self._rename(reading)
            ends = [nodes[end] for end in ends]
            self.holes = {nodes[hole] for hole in self.holes}
            self.cut = {nodes[hole] for hole in self.cut}
        specs = shapes_and_dtypes(leaves)
        self.shapes = [shape for shape, _ in specs]
        self.dtypes = [dtype for _, dtype in specs]
        self.places = [
            None if dtype is None else end for end, dtype in zip(ends, self.dtypes, strict=True)
        ]
        if not reading.is_plain:
            self._check_paths()

    def _rename(self, reading: Reading) -> dict[int, int]:
        """Split the names that hold a slash, and leave out boxes and containers of nothing.

        Returns:
            For each value that was read, its node.
        """
        self.names, self.parents = [""], [0]
        nodes = {0: 0}
        for end in reading.ends:
            line = [end]
            while line[-1] not in nodes:
                line.append(reading.parents[line[-1]])
            for above, value in itertools.pairwise(reversed(line)):
                nodes[value] = self._descend(nodes[above], split_name(reading.names[value]))
        return nodes

    @property
    def children(self) -> list[dict[str, int]]:
        """Per node, the nodes below it by name."""
        if self._children is None:  # few trees are asked
            children = [_CHILDLESS] * len(self.names)
            for node, (name, above) in enumerate(zip(self.names, self.parents, strict=True)):
                if children[above] is _CHILDLESS:
                    children[above] = {}
                if node:
                    children[above][name] = node
            self._children = children
        return self._children

    def _descend(self, node: int, segments: Iterable[str]) -> int:
        """The node at the end of a path from another one, made where there is none."""
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
        return node

    def _check_paths(self) -> None:
        arrays = [node for node in self.places if node is not None]
        if len(set(arrays)) < len(arrays):
            [(twice, _)] = collections.Counter(arrays).most_common(1)
            raise RuleError(
                f"two arrays of the tree have the path {shorten(self.text(twice))!r} (a '/' inside "
                "a key separates segments too); rename one of the keys"
            )
        for array in set(self.parents[1:]).intersection(arrays):
            child = next(iter(self.children[array].values()))
            raise RuleError(
                f"the tree has an array at {shorten(self.text(array))!r} and another "
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
        found: dict[int, int] = {}
        for path, module in entries(skeleton, (linear, *convolution)).items():
            node = self.node_at(path)
            if node is not None and isinstance(module, (linear, *convolution)):
                found[node] = 2 if isinstance(module, linear) else module.num_spatial_dims + 2
        return found

    def alias(self, leaf: int, segments: Iterable[str]) -> None:
        """Note that a path leads to an array that stands elsewhere in the tree."""
        node = self._descend(0, segments)
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

    def is_layer(self, node: int) -> bool:
        """Whether a node stands for a layer of a stack."""
        return node in self._stacked

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
        children = self.children  # made of the nodes that there are before those of layers
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
            children.append(below)
            pending.extend((child, copy, (below, key)) for key, child in children[node].items())
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


_CHILDLESS: dict[str, int] = {}  # shared by all nodes that have no children, and never written to


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
    if isinstance(leaf, type):  # those of NumPy's numbers have a shape, for their instances
        return (), None
    try:
        return leaf.shape, leaf.dtype
    except AttributeError:
        is_number = isinstance(leaf, bool | int | float | complex)
        return (), jnp.result_type(leaf) if is_number else None


def shapes_and_dtypes(leaves: Sequence[Any]) -> list[tuple[tuple[int, ...], Any]]:
    """Those of each leaf, in less time where all are arrays."""
    if not any(issubclass(kind, type) for kind in set(map(type, leaves))):
        with contextlib.suppress(AttributeError):
            return [(leaf.shape, leaf.dtype) for leaf in leaves]
    return [shape_and_dtype(leaf) for leaf in leaves]


def is_array(leaf: Any) -> bool:
    """Whether something is an array or a number."""
    return shape_and_dtype(leaf)[1] is not None
