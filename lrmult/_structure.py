"""Facts about a model that its parameter tree does not hold."""

import dataclasses
import difflib
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from lrmult._errors import AxisError, LrmultError, PositionError, RuleError, listing, shorten, show
from lrmult._paths import ParamTree
from lrmult._patterns import Names, escape, parse
from lrmult._positions import natural_order


@dataclasses.dataclass(frozen=True)
class Structure:
    """What rules cannot read off a parameter tree. `structure_of` reads it from a model.

    Two are joined by ``|``: where both speak of the order or the layers of one node, the right one
    counts.

    Attributes:
        order: by the path of a node, the names of its children in order. Names that are not in the
            tree are layers without parameters: they count, so that ``-2`` is the last but one
            *layer*. Arrays that a node holds itself need not be named. Children of one numbered
            family (``layers_0``, ``layers_2``) are counted by their numbers all the same; their
            order only tells what stands in the gaps and at the end.
        shared: groups of the paths of one array. A rule on any of them speaks of that array; if
            several rules do, the first in the list wins. One path of a group at least is in the
            tree. (It ties no arrays together: that is the model's business.)
        stacked: the nodes whose layers are stacked, by path, each with the axis along which every
            array below it is stacked (as `flax.linen.scan`, `flax.nnx.scan` and `flax.nnx.vmap`
            make them). There ``"layers[2:4]"`` is a slice of that axis.

    The path of the root is ``""``.

    Raises:
        RuleError: if one of them is not as above. What is wrong with respect to a tree shows in
            `compile_rules`.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"layers": {"kernel": jnp.ones((12, 8, 8))}, "head": jnp.ones((8, 2))}
        >>> structure = lm.Structure(stacked={"layers": 0})
        >>> print(lm.compile_rules([("layers[:4]", None)], params, structure=structure))
        parameters   arrays        size                        multiplier   rule
        -----------------------------------------------------------------------------------
        head         f32[8,2]        16                                 1   none
        layers       f32[12,8,8]    768   layers 0-3 of 12 frozen; rest 1   0: 'layers[:4]'
        <BLANKLINE>
        2 arrays, 784 parameters: 528 train, 256 frozen
        >>> chain = {"conv": {"w": jnp.ones(3)}, "dense": {"w": jnp.ones(3)}}
        >>> structure = lm.Structure(order={"": ["conv", "pool", "dense", "softmax"]})
        >>> plan = lm.compile_rules([(-2, 1), (..., None)], chain, structure=structure)
        >>> plan.trainable
        {'conv': {'w': False}, 'dense': {'w': True}}
    """

    order: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    shared: Sequence[Sequence[str]] = ()
    stacked: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # The paths of all nodes of a model from which facts were read, of which a tree may hold a part
    # only. None if nothing was read.
    _read: frozenset[str] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        fields = {
            "order": _read_order(self.order),
            "shared": _read_groups(self.shared),
            "stacked": _read_stacked(self.stacked),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __or__(self, other: "Structure") -> "Structure":
        if not isinstance(other, Structure):
            return NotImplemented
        read = None
        if self._read is not None or other._read is not None:
            by_hand = {*other.order, *other.stacked} - (other._read or frozenset())
            read = (self._read or frozenset()) - by_hand | (other._read or frozenset())
        return Structure(
            order={**self.order, **other.order},
            shared=(*self.shared, *other.shared),
            stacked={**self.stacked, **other.stacked},
            _read=read,
        )

    def is_read(self, path: str) -> bool:
        """Whether what it says of a path was read from a model."""
        return self._read is not None and path in self._read

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # Plans are cached by it: every eager update asks for it.
        return hash((*map(frozenset, (self.order.items(), self.shared, self.stacked.items())),))

    def __reduce__(self) -> Any:
        return Structure, (dict(self.order), self.shared, dict(self.stacked), self._read)

    def __repr__(self) -> str:
        facts = {
            "order": {path: list(names) for path, names in self.order.items()},
            "shared": [list(group) for group in self.shared],
            "stacked": dict(self.stacked),
        }
        return f"Structure({', '.join(f'{name}={fact}' for name, fact in facts.items() if fact)})"


def _read_order(order: Any) -> Mapping[str, tuple[str, ...]]:
    if not isinstance(order, Mapping):
        raise RuleError(
            f"order= is {show(order)}; write the children of each path, as in "
            "Structure(order={'': ['conv', 'pool', 'dense']})"
        )
    read: dict[str, tuple[str, ...]] = {}
    for path, names in order.items():
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not names or not all(isinstance(name, str) for name in names):
            raise RuleError(
                f"order= has {show(names)} for {show(path)}; write a list of the names of its "
                "children"
            )
        if len(set(names)) < len(names):
            raise RuleError(f"order= names a child of {shorten(path)!r} twice: {show(names)}")
        below = [name for name in names if "/" in name]
        if below:
            raise RuleError(
                f"order= names {shorten(below[0])!r} as a child of {shorten(path)!r}; the children "
                "of a child have an entry of their own"
            )
        try:
            family = natural_order(names, path)
        except PositionError as error:
            raise RuleError(f"order= has {show(names)} for {shorten(path)!r}: {error}") from None
        if family is not None and list(names) != family.in_order():
            raise RuleError(
                f"order= has {show(names)} for {shorten(path)!r}, but children of one numbered "
                "family are counted by their numbers; write them in that order, or name them"
            )
        read[_canonical(path, "order")] = tuple(names)
    return MappingProxyType(read)


def _read_groups(shared: Any) -> tuple[tuple[str, ...], ...]:
    """Groups of paths; those that have a path in common are one."""
    example = "Structure(shared=[['embed/embedding', 'head/kernel']])"
    if isinstance(shared, str | Mapping) or not isinstance(shared, Iterable):
        raise RuleError(f"shared= is {show(shared)}; write groups of paths, as in {example}")
    groups: list[dict[str, None]] = []
    for group in shared:
        if isinstance(group, str) or not isinstance(group, Iterable):
            raise RuleError(f"shared= has {show(group)}; write groups of paths, as in {example}")
        paths = dict.fromkeys(_canonical(path, "shared") for path in group)
        if len(paths) < 2:
            raise RuleError(
                f"shared= has {show(group)}; a group has two paths or more of one array"
            )
        for known in [known for known in groups if not known.keys().isdisjoint(paths)]:
            paths = known | paths
            groups.remove(known)
        groups.append(paths)
    return tuple(map(tuple, groups))


def _read_stacked(stacked: Any) -> Mapping[str, int]:
    if not isinstance(stacked, Mapping):
        raise RuleError(
            f"stacked= is {show(stacked)}; write the axis of each path, as in "
            "Structure(stacked={'decoder/layers': 0})"
        )
    for path, axis in stacked.items():
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise RuleError(f"stacked= has {show(axis)} for {show(path)}; an axis is an int")
    return MappingProxyType({_canonical(path, "stacked"): axis for path, axis in stacked.items()})


def read_structure(structure: Any) -> Structure:
    """Facts about a model; None is none."""
    if structure is None:
        return Structure()
    if not isinstance(structure, Structure):
        raise RuleError(
            f"structure= is {show(structure)}; write lrmult.structure_of(model), or "
            "lrmult.Structure(stacked={'path': axis})"
        )
    return structure


def told_of_another(structure: Structure | None) -> Structure:
    """The facts as they may hold of another model too: what is not there is passed over."""
    read = read_structure(structure)
    paths = itertools.chain(read.order, *read.shared, read.stacked)
    return dataclasses.replace(read, _read=frozenset(paths))


@functools.lru_cache(maxsize=4096)
def _segments(path: Any, fact: str) -> tuple[str, ...]:
    """The names along a path; the root has none."""
    if path == "" and fact != "shared":
        return ()
    if not isinstance(path, str):
        raise RuleError(f"{show(path)} in {fact}= is no path; lrmult.paths(...) lists them")
    try:
        names = literal_path(path)
    except LrmultError as error:
        raise RuleError(f"the path {shorten(path)!r} in {fact}= cannot be read: {error}") from None
    if names is None:
        raise RuleError(
            f"the path {shorten(path)!r} in {fact}= has a wildcard or a position; write the path "
            "of one node in full, as lrmult.paths(...) shows it"
        )
    return names


def _canonical(path: Any, fact: str) -> str:
    """A path as `lrmult.paths` lists it, of the ways in which it may be written."""
    return "/".join(map(escape, _segments(path, fact)))


def literal_path(text: str) -> tuple[str, ...] | None:
    """The names along a path, without escapes; None if it has a wildcard or a position.

    Raises:
        PatternError: if it cannot be read.
    """
    steps = parse(text).steps
    names = [step for step in steps if isinstance(step, Names) and step.is_literal]
    return tuple(name.alternatives[0][0] for name in names) if len(names) == len(steps) else None


def add_structure(tree: ParamTree, structure: Structure) -> None:
    """Add the facts to a tree.

    Raises:
        RuleError: if there is no such node.
        AxisError: if the arrays below a node are not all stacked along its axis.
    """
    if structure._read is not None:
        tree.remedy = (
            "keep them in a list, or say their order: structure | lrmult.Structure(order={{path}: "
            "[...]}) (structure_of tells none where the attributes of an NNX module stand sorted, "
            "as nnx.jit leaves them)"
        )
    own = tree.nodes  # without those that only other paths of arrays lead to
    _share(tree, structure)
    _put_in_order(tree, structure, own)
    _stack(tree, structure)


def _node(tree: ParamTree, structure: Structure, path: str, fact: str, says: str) -> int | None:
    """The node of a path; None if it may have been cut out of the tree.

    Args:
        tree: the tree.
        structure: what is said of it.
        path: the path.
        fact: the field of the structure that has it.
        says: what that says of it, for a message.

    Raises:
        RuleError: if there is no such node.
    """
    segments = _segments(path, fact)
    node = tree.node_at(segments)
    if node is None and not structure.is_read(path) and not _may_be_cut_out(tree, segments):
        known = [tree.text(each) for each in tree.nodes[1:]]
        near = difflib.get_close_matches(path, known, 1)
        raise RuleError(
            f"structure= says that {says.format(repr(shorten(path)))}, but nothing in the tree has "
            "that path; "
            + (f"did you mean {shorten(near[0])!r}?" if near else "lrmult.paths(params) lists them")
        )
    return node


def _may_be_cut_out(tree: ParamTree, segments: tuple[str, ...]) -> bool:
    return not tree.holes.isdisjoint(tree.nodes_along(segments))


def _share(tree: ParamTree, structure: Structure) -> None:
    leaves = {place: leaf for leaf, place in tree.arrays()} if structure.shared else {}
    for group in structure.shared:
        found = {path: tree.node_at(_segments(path, "shared")) for path in group}
        places = {path: node for path, node in found.items() if node in leaves}
        if not places:  # none is there, or they have been cut out
            for path in group:
                _node(tree, structure, path, "shared", "{} is shared")
            continue
        arrays = [leaves[node] for node in places.values() if node is not None]
        for leaf in arrays[1:]:
            if tree.shapes[leaf] != tree.shapes[arrays[0]]:
                raise RuleError(
                    f"structure= says that {tree.show(arrays[0])} and {tree.show(leaf)} are one "
                    "array, but they have unlike shapes"
                )
        for path, node in found.items():
            if node is not None and tree.children[node]:
                raise RuleError(
                    f"structure= says that {shorten(path)!r} is an array, but it holds "
                    f"{listing(tree.children[node], 3)}; write the path of each array"
                )
            for leaf in arrays:
                if node != tree.places[leaf]:
                    tree.alias(leaf, _segments(path, "shared"))
    for place in {*leaves, *(node for nodes in tree.aliases.values() for node in nodes)}:
        for child in tree.children[place].values():
            raise RuleError(
                f"structure= says that there is an array at {shorten(tree.text(child))!r}, below "
                f"that at {shorten(tree.text(place))!r}"
            )


def _put_in_order(tree: ParamTree, structure: Structure, own: range) -> None:
    # What has been cut out may have been an array.
    arrays = {place for _, place in tree.arrays()}.union(tree.holes, *tree.aliases.values())
    for path, names in structure.order.items():
        node = _node(tree, structure, path, "order", "the children of {} have an order")
        if node is None:
            continue
        left = {
            name
            for name, child in tree.children[node].items()
            if name not in names and child in own and child not in arrays
        }
        if structure.is_read(path):
            # What the model did not have when it was read may be a layer.
            if not all(structure.is_read(tree.text(tree.children[node][name])) for name in left):
                continue
        elif left:
            name = min(left)
            where = f"of {shorten(path)!r}" if path else "at the root"
            near = difflib.get_close_matches(name, {*names} - tree.children[node].keys(), 1)
            meant = f"; is it {shorten(near[0])!r} there?" if near else "; name it too"
            raise RuleError(
                f"structure= gives an order to the children {where} without "
                f"{shorten(name)!r}{meant}"
            )
        tree.order[node] = tuple(names)


def _stack(tree: ParamTree, structure: Structure) -> None:
    found: dict[int, tuple[str, int]] = {}
    for path, axis in structure.stacked.items():
        node = _node(tree, structure, path, "stacked", "{} is stacked")
        if node is not None:
            found[node] = path, axis
    below: dict[int, list[int]] = {node: [] for node in found}  # -> leaves
    aliases = ((leaf, alias) for leaf, nodes in tree.aliases.items() for alias in nodes)
    for leaf, end in itertools.chain(tree.arrays(), aliases) if found else ():
        for node in tree.line(end):
            if node in below:
                below[node].append(leaf)
    below = {node: list(dict.fromkeys(leaves)) for node, leaves in below.items()}

    def top_of(node: int) -> int:
        """The uppermost node that has the layers of this one too."""
        path, axis = found[node]
        for above in tree.line(node):
            same = structure.is_read(path) or below.get(above) == below[node]
            if above in found and found[above][1] == axis and same:
                return above
        return node

    taken: dict[tuple[int, int], list[int]] = {}  # leaf and axis -> nodes, the lower ones first
    for node in sorted(found, reverse=True):  # a node's number is above those of its parents
        path, axis = found[node]
        if top_of(node) != node:
            continue
        for leaf in below[node]:
            others = taken.setdefault((leaf, axis % max(len(tree.shapes[leaf]), 1)), [])
            others.append(node)
            inside = [other for other in others[:-1] if node in tree.line(other)]
            if inside:
                other = found[inside[0]][0]
                raise AxisError(
                    f"structure= says of both {shorten(path)!r} and {shorten(other)!r} that axis "
                    f"{axis} of {tree.show(leaf)} is that of their layers; axes are those of the "
                    "array as it stands in the tree"
                )
        if below[node]:
            try:
                layers = _layers(tree, below[node], path, axis)
            except AxisError:
                if structure.is_read(path):  # the tree holds more than the layers that told it
                    continue
                raise
            tree.stack(node, axis, layers)
        else:  # all that was there has been cut out, and its layers with it
            tree.holes.add(node)
            tree.cut.add(node)
    for node in found:
        if top_of(node) in tree.layers and node not in tree.layers:
            tree.stack_below(node, top_of(node))


def _layers(tree: ParamTree, leaves: list[int], path: str, axis: int) -> int:
    """The number of layers, on which all arrays below a node must agree."""
    sizes: dict[int, int] = {}  # size -> the first leaf that has it
    for leaf in leaves:
        shape = tree.shapes[leaf]
        if not -len(shape) <= axis < len(shape):
            raise AxisError(
                f"structure= says that all below {shorten(path)!r} is stacked along axis {axis}, "
                f"which {tree.show(leaf)} does not have; name the nodes that are stacked"
            )
        sizes.setdefault(shape[axis], leaf)
    if len(sizes) > 1:
        (one, first), (other, second), *_ = sizes.items()
        raise AxisError(
            f"structure= says that all below {shorten(path)!r} is stacked along axis {axis}, but "
            f"{tree.show(first)} has {one} layers there and {tree.show(second)} has {other}; name "
            "the axis or the nodes that are meant"
        )
    return next(iter(sizes))


def tied_by_accident(tree: ParamTree, leaves: Sequence[Any], trains: Sequence[bool]) -> str | None:
    """What to say of arrays that are one object, and will be two after the first step."""
    seen: dict[int, int] = {}  # of an object -> its first leaf
    tied: dict[int, list[str]] = {}  # first leaf -> paths
    for leaf, array in enumerate(leaves):
        if not isinstance(array, jax.Array | np.ndarray) or isinstance(array, jax.core.Tracer):
            continue
        first = seen.setdefault(id(array), leaf)
        one, other = tree.places[first], tree.places[leaf]
        is_told = one in tree.aliases.get(leaf, ())
        if one is None or other is None or first == leaf or is_told:
            continue
        if trains[first] or trains[leaf]:
            tied.setdefault(first, [tree.text(one)]).append(tree.text(other))
    if not tied:
        return None
    group, *others = tied.values()
    more = f" (and so {'is' if len(others) == 1 else 'are'} {len(others)} more)" if others else ""
    return (
        f"{listing(group, 3)} are one array{more}, but a tree of parameters keeps no ties: they "
        "come apart at the first step, unless the model ties them again. If it does, say so: "
        f"structure=lrmult.Structure(shared=[{group[:2]}])"
    )
