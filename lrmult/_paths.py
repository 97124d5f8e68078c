"""The paths of a parameter tree, in one dialect for every library.

`ParamTree` reads a pytree once: its arrays, what encloses them, and the holes in it. Nothing else
in the package looks at JAX key paths.
"""

import collections
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from optax import MaskedNode

from lrmult._errors import RuleError, shorten
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
    """

    def __init__(self, params: PyTree) -> None:
        self.treedef: Any = jax.tree.structure(params)
        self.names: list[str] = [""]
        self.parents: list[int] = [0]
        self.children: list[dict[str, int]] = [{}]
        self.holes: set[int] = set()
        self.cut: set[int] = set()
        self.places: list[int | None] = []
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[Any] = []
        self._read(params)

    def _read(self, params: PyTree) -> None:
        """Fill the lists. This loop is most of what compiling rules costs."""
        names, parents, children = self.names, self.parents, self.children
        previous: KeyPath = ()
        nodes = [0]  # along the previous path
        for path, value in _flatten(params, _box_types()):
            shared = 0
            for key, before in zip(path, previous, strict=False):
                if key is not before:  # JAX makes one key for all paths through it
                    break
                shared += 1
            del nodes[shared + 1 :]
            node = nodes[-1]
            for key in path[shared:]:
                field = _FIELDS.get(type(key))
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

    def text(self, node: int) -> str:
        """The path of a node, as it is written in a rule."""
        return "/".join(map(escape, self._segments(node)))

    def raw_text(self, node: int) -> str:
        """The path with nothing escaped: what a regular expression sees."""
        return "/".join(self._segments(node))

    def _segments(self, node: int) -> list[str]:
        found: list[str] = []
        while node:
            found.append(self.names[node])
            node = self.parents[node]
        return found[::-1]

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


def _box_types() -> tuple[type, ...]:
    """The classes that hold an array under ``value``, of those libraries that are imported."""
    found = []
    for module, name in (("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata")):
        box = getattr(sys.modules.get(module), name, None)
        if isinstance(box, type):
            found.append(box)
    return tuple(found)


def _flatten(tree: PyTree, boxes: tuple[type, ...]) -> Iterable[tuple[KeyPath, Any]]:
    """Flatten with paths; holes are kept, and boxes leave no trace in the path."""
    stop = (type(None), MaskedNode, *boxes)
    found: list[tuple[KeyPath, Any]] = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, stop)
    )[0]
    if not boxes or not any(isinstance(value, boxes) for _, value in found):
        return found
    return itertools.chain.from_iterable(
        _unbox(path, value, boxes) if isinstance(value, boxes) else [(path, value)]
        for path, value in found
    )


def _unbox(path: KeyPath, box: Any, boxes: tuple[type, ...]) -> Iterator[tuple[KeyPath, Any]]:
    children = jax.tree_util.tree_flatten_with_path(box, is_leaf=lambda node: node is not box)[0]
    for keys, child in children:
        if not keys:  # a box that JAX does not know
            yield path, child
            continue
        [key] = keys
        # Only the attribute of a box is dropped: attention has a real layer called "value".
        owned = isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"
        inner = path if owned else (*path, key)
        for below, leaf in _flatten(child, boxes):
            yield (*inner, *below), leaf
