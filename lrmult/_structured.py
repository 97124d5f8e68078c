"""The facts about a model, entered in its parameter tree."""

import difflib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lrmult._errors import AxisError, RuleError, listing, shorten
from lrmult._paths import ParamTree
from lrmult._structure import Structure, segments_of


def add_structure(tree: ParamTree, structure: Structure) -> None:
    """Add the facts to a tree.

    Raises:
        RuleError: if there is no such node.
        AxisError: if the arrays below a node are not all stacked along its axis.
    """
    tree.is_read = structure._read is not None
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
    segments = segments_of(path, fact)
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
        found = {path: tree.node_at(segments_of(path, "shared")) for path in group}
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
                    tree.alias(leaf, segments_of(path, "shared"))
    for place in {*leaves, *(node for nodes in tree.aliases.values() for node in nodes)}:
        for child in tree.children[place].values():
            raise RuleError(
                f"structure= says that there is an array at {shorten(tree.text(child))!r}, below "
                f"that at {shorten(tree.text(place))!r}"
            )


def _put_in_order(tree: ParamTree, structure: Structure, own: range) -> None:
    if not structure.order:
        return
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


def tied_by_accident(
    tree: ParamTree, leaves: Sequence[Any], trains: Callable[[int], bool]
) -> str | None:
    """What to say of arrays that are one object, and will be two after the first step.

    Whether a leaf trains is asked of these alone.
    """
    kinds = {kind: _is_array_type(kind) for kind in set(map(type, leaves))}
    arrays = [(leaf, array) for leaf, array in enumerate(leaves) if kinds[type(array)]]
    if len({id(array) for _, array in arrays}) == len(arrays):
        return None
    seen: dict[int, int] = {}  # of an object -> its first leaf
    tied: dict[int, list[str]] = {}  # first leaf -> paths
    for leaf, array in arrays:
        first = seen.setdefault(id(array), leaf)
        one, other = tree.places[first], tree.places[leaf]
        is_told = one in tree.aliases.get(leaf, ())
        if one is None or other is None or first == leaf or is_told:
            continue
        if trains(first) or trains(leaf):
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


def _is_array_type(kind: type) -> bool:
    return issubclass(kind, jax.Array | np.ndarray) and not issubclass(kind, jax.core.Tracer)
