"""Pytrees, level by level: what a container holds, by the names that this has in paths.

Only here are the keys of JAX read.
"""

import dataclasses
import enum
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import jax
import numpy as np
from jax.tree_util import GetAttrKey
from optax import MaskedNode

from lrmult._libraries import box_types

PyTree: TypeAlias = Any


# What a container holds, in the order of JAX: per child its name, which may hold slashes, or None
# where it stands in the place of its container, which is a box then; the children; whether all
# names are distinct and none holds a slash; and whether they are those of the fields of a class.
Level: TypeAlias = tuple[Sequence[Any], Sequence[Any], bool, bool]
_NOTHING: Level = (), (), True, False


class End(enum.Enum):
    """What is no container."""

    LEAF = enum.auto()
    HOLE = enum.auto()  # where something may have been cut out: None, `optax.MaskedNode`


LEAF: Final = End.LEAF
HOLE: Final = End.HOLE


class Levels(dict[type, End | Callable[[Any], Level]]):
    """How values are read, by their class; those of a class that is not yet known, by `learn`."""

    def __init__(self) -> None:
        super().__init__({dict: _of_dict, list: _of_sequence, tuple: _of_sequence})
        self._boxes = box_types()
        self.of_box = functools.partial(_of_class, {}, _tell_box)
        self._of_node = functools.partial(_of_class, {}, _tell_node)

    def learn(self, value: Any) -> End | Callable[[Any], Level]:
        """Tell how values of a class are read from the first of them."""
        if value is None or isinstance(value, MaskedNode):
            way: End | Callable[[Any], Level] = HOLE
        elif jax.tree_util.all_leaves([value]):
            way = LEAF
        else:
            way = self.of_box if isinstance(value, self._boxes) else self._of_node
        return self.setdefault(type(value), way)

    def read(self, value: Any) -> Level | None:
        """What a value holds; None if it is no container."""
        way = self.get(type(value)) or self.learn(value)
        return None if isinstance(way, End) else way(value)

    def unbox(self, value: Any) -> tuple[End | Callable[[Any], Level], Any]:
        """What is in a box, if it holds nothing but a value, and how that is read."""
        way: End | Callable[[Any], Level] = self.of_box
        while way is self.of_box:
            names, held, _, _ = self.of_box(value)
            if names != [None]:
                break
            value = held[0]
            way = self.get(type(value)) or self.learn(value)
        return way, value


def _of_dict(value: dict[Any, Any]) -> Level:
    names, held, are_plain = sorted(value), [], True
    for key in names:
        if type(key) is not str or "/" in key:
            are_plain = False
        held.append(value[key])
    if not are_plain:
        names = [str(key) for key in names]
        are_plain = _are_plain(names)
    return names, held, are_plain, False


def _of_sequence(value: Sequence[Any]) -> Level:
    return [str(number) for number in range(len(value))], value, True, False


# What the keys of one level tell: names, and what a `Level` says of these.
Told: TypeAlias = tuple[list[Any], bool, bool]


def _of_class(told: dict[Any, Told], tell: Callable[[list[Any]], Told], value: Any) -> Level:
    # To ask for the keys takes long, and those that are fields are told by the class and what it
    # calls static. (Those of a mapping are not: 1 and True are equal.)
    held, static = jax.tree_util.default_registry.flatten_one_level(value)
    kind: Any = type(value), static
    try:
        if kind in told:
            names, are_plain, are_fields = told[kind]
            return names, held, are_plain, are_fields
    except TypeError:  # something static that cannot be hashed
        kind = None
    is_below = functools.partial(operator.is_not, value)
    found, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_below)
    keys = [key for (key,), _ in found]
    names, are_plain, are_fields = tell(keys)
    if kind and all(isinstance(key, GetAttrKey) for key in keys):
        told[kind] = names, are_plain, are_fields
    return names, held, are_plain, are_fields


def _tell_node(keys: list[Any]) -> Told:
    names = [_name_of(key) for key in keys]
    return names, _are_plain(names), any(type(key) is GetAttrKey for key in keys)


def _tell_box(keys: list[Any]) -> Told:
    # Only the attribute of a box is dropped: attention has a real layer called "value".
    owned = [isinstance(key, GetAttrKey) and key.name == "value" for key in keys]
    names = [None if own else _name_of(key) for key, own in zip(keys, owned, strict=True)]
    return names, False, not any(owned) and any(type(key) is GetAttrKey for key in keys)


def _are_plain(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names) and "/" not in "".join(names)


# Where the keys of JAX say what they are called.
_FIELDS = {
    jax.tree_util.DictKey: "key",
    jax.tree_util.FlattenedIndexKey: "key",
    GetAttrKey: "name",
    jax.tree_util.SequenceKey: "idx",
}


def _name_of(key: Any) -> str:
    field = _FIELDS.get(type(key))
    name = getattr(key, field) if field else key
    return name if type(name) is str else str(name)


@dataclasses.dataclass
class Reading:
    """All values of a pytree: containers, leaves and holes, each level after that above it.

    Attributes:
        names: per value, its name, as in a `Level`; that of the whole tree is empty.
        parents: per value, the container that holds it; 0 for the whole tree, which is number 0.
        ends: the leaves and the holes, in the order of JAX.
        holes: the holes.
        cut: those of them where a whole subtree may have been cut out. A ``None`` in the field of
            a class is one array: Equinox filters leaf by leaf.
        is_plain: whether each name is one segment, no two in a container are the same, and no
            container is empty.
    """

    names: list[Any]
    parents: list[int]
    ends: list[int]
    holes: set[int]
    cut: set[int]
    is_plain: bool


def read(tree: PyTree) -> Reading:
    """Read a pytree. This loop is much of what compiling rules costs."""
    levels = Levels()
    names: list[Any] = [""]
    parents, starts = [0], [0]
    ends: list[int] = []
    holes: set[int] = set()
    cut: set[int] = set()
    fields: set[int] = set()
    is_plain = True
    level: Sequence[Any] = [tree]
    while level:
        start = len(names)
        below: list[Any] = []
        for number, value in enumerate(level, starts[-1]):
            way = levels.get(type(value)) or levels.learn(value)
            if way is levels.of_box:
                way, value = levels.unbox(value)
            if way is LEAF:
                ends.append(number)
            elif way is HOLE:
                ends.append(number)
                holes.add(number)
                if value is not None or number not in fields:
                    cut.add(number)
            else:
                children, held, are_plain, are_fields = way(value)
                if not (are_plain and children):
                    is_plain = False
                if are_fields or (number in fields and None in children):
                    fields.update(range(len(names), len(names) + len(children)))
                names += children
                parents += [number] * len(children)
                below += held
        starts.append(start)
        level = below
    if ends and ends[0] < starts[-2]:  # on one level they stand in order
        before = _count_before(np.array(parents), starts, ends)
        ends = np.array(ends)[np.argsort(before[ends], kind="stable")].tolist()
    return Reading(names, parents, ends, holes, cut, is_plain)


def _count_before(parents: Any, starts: Sequence[int], ends: Sequence[int]) -> Any:
    """How many of some values come before each value, in JAX's order.

    Args:
        parents: per value, the container that holds it.
        starts: the first value of each level; and their number.
        ends: the values to count, none of which holds another.
    """
    count, before = np.zeros((2, len(parents)), int)
    count[ends] = 1
    levels = list(itertools.pairwise(starts))[1:]
    for first, last in reversed(levels):
        np.add.at(count, parents[first:last], count[first:last])
    for first, last in levels:
        above, here = parents[first:last], count[first:last]
        left = np.cumsum(here) - here  # of it on this level; less those of other parents
        before[first:last] = before[above] + left - left[np.searchsorted(above, above)]
    return before


def split_name(name: str | None) -> list[str]:
    """What a name adds to a path."""
    return [] if name is None else name.split("/")


def children_of(node: PyTree) -> dict[tuple[str, ...], Any]:
    """What stands directly below a node of a pytree, by the names on the way; boxes do not show."""
    levels = Levels()
    names, held, *_ = levels.read(node) or _NOTHING
    if isinstance(node, box_types()) and names:
        [node] = held
        names, held, *_ = levels.read(node) or _NOTHING
    return {tuple(split_name(name)): child for name, child in zip(names, held, strict=True)}


def entries(tree: PyTree, whole: tuple[type, ...] = ()) -> dict[tuple[str, ...], Any]:
    """All that stands in a pytree, by the names along its path, in the order of its leaves.

    Holes and containers without children are among it.

    Args:
        tree: the pytree.
        whole: classes of containers that are taken as they are, with all that they hold.
    """
    levels = Levels()
    found: dict[tuple[str, ...], Any] = {}
    pending: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while pending:
        path, value = pending.pop()
        names, held, *_ = levels.read(value) or _NOTHING
        if names and not isinstance(value, whole):
            below = zip(names, held, strict=True)
            pending += reversed([((*path, *split_name(name)), child) for name, child in below])
        elif isinstance(levels[type(value)], End) or isinstance(value, (tuple, list, dict, *whole)):
            found[path] = value
    return found
