"""A naive interpreter of the rule language, slow and obvious, written from the contract alone.

It reads no text: a target is given by its structure, which the tests render to text for the package
to parse. A structure is a tuple of parts:

* ``Name(glob, at)``: one segment that fits the glob; with a position, the child of that node at the
  position, or the member of the family of that name;
* ``...``: any number of segments;
* an int or a slice: children by position.

A glob is a tuple of pieces: a literal str, `STAR`, or a list of globs of which any may fit. Instead
of a structure, a target may be a compiled regular expression or a predicate, as in the package, and
`Along`, `Neurons` and `Elements` are the parts of what another target selects.

Nothing is factored: what a rule selects is one bool per element of every array.
"""

import dataclasses
import re
from typing import Any

import numpy as np

STAR = None


@dataclasses.dataclass(frozen=True)
class Name:
    glob: tuple
    at: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Along:
    target: Any
    axis: int
    index: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Neurons:
    target: Any
    index: Any
    axis: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Elements:
    target: Any
    mask: Any


@dataclasses.dataclass(eq=False)
class Node:
    """A node of a tree, with its layers if it is a stack, and the given order of its children.

    Below a stack, `stacks` are the axes along which layers lie; in a layer, `where` says on which
    of them and where it is. A child in an order is None if it is not in the tree.
    """

    path: tuple
    children: dict = dataclasses.field(default_factory=dict)
    leaf: Any = None
    hole: bool = False
    layers: dict | None = None
    order: list | None = None
    stacks: list = dataclasses.field(default_factory=list)
    where: tuple = ()

    def listed(self):
        """A copy of this node with the children that have an order, in it, and no others."""
        children = {name: self.children.get(name) for name in self.order}
        return dataclasses.replace(self, children=children, order=None)

    def below(self):
        """This node and all below it."""
        return [self, *(node for child in self.children.values() for node in child.below())]

    def narrowed(self, place):
        """A copy of this node and all below it, at one more place (axis, number)."""
        children = {name: child.narrowed(place) for name, child in self.children.items()}
        layers, where = self.layers, (*self.where, place)
        if layers is not None:
            layers = {number: layer.narrowed(place) for number, layer in layers.items()}
        return dataclasses.replace(self, children=children, layers=layers, where=where)

    def cells(self):
        """Which elements of its array are meant."""
        mask = everything(self.leaf)
        for axis, number in self.where:
            mask = mask & along(self.leaf, axis, number)
        return mask


class RefusedError(Exception):
    """Two leaves of one path, or a leaf above another: rules cannot speak of such a tree."""


class FailedError(Exception):
    """What is wrong with a part of an array, by its kinds."""


def grow(tree, stacked=(), order=(), shared=()):
    """Turn containers into nodes by segment; the root, and the leaves as `jax.tree.leaves` does.

    A stack is named by the text of its path, all else by the tuple of segments. Every path of a
    shared array becomes a node that holds it; those that the tree itself has are leaves.
    """
    root, leaves = Node(()), []
    _grow(root, tree, leaves)
    for leaf in leaves:
        if leaf.children:
            raise RefusedError(leaf.path)
    for group in joined(shared):
        arrays = [leaf.leaf for leaf in leaves if leaf.path in group]
        for path in sorted(group) if arrays else ():
            node = root
            for segment in path:
                node = node.children.setdefault(segment, Node((*node.path, segment)))
            node.leaf = arrays[0] if node.leaf is None else node.leaf
    for path, names in dict(order).items():
        node = root
        for segment in path:
            node = node.children[segment]
        node.order = names
    # The innermost first, since a layer of a stack holds the stacks that are below it.
    for path, axis in sorted(dict(stacked).items(), key=lambda item: -len(item[0])):
        node = root
        for segment in path.split("/") if path else []:
            node = node.children[segment]
        for below in node.below():
            below.stacks.append(axis)
        sizes = {leaf.leaf.shape[axis] for leaf in node.below() if leaf.leaf is not None}
        node.layers = {i: node.narrowed((axis, i)) for size in sizes for i in range(size)}
    return root, leaves


def joined(groups):
    """The groups of paths as sets; those that have one in common are one."""
    found = []
    for group in map(set, groups):
        apart = [other for other in found if not other & group]
        found = [*apart, group.union(*[other for other in found if other & group])]
    return found


def _grow(node, tree, leaves):
    if isinstance(tree, dict):
        items = [(str(key).split("/"), tree[key]) for key in sorted(tree)]
    elif isinstance(tree, list | tuple):
        items = [([str(index)], child) for index, child in enumerate(tree)]
    else:
        if tree is None:
            node.hole = True
        elif node.leaf is not None:
            raise RefusedError(node.path)
        else:
            node.leaf = tree
            leaves.append(node)
        return
    for segments, child in items:
        place = node
        for segment in segments:
            place = place.children.setdefault(segment, Node((*place.path, segment)))
        _grow(place, child, leaves)


def fits(glob, text):
    """Whether a glob matches the whole of a segment."""
    if not glob:
        return text == ""
    first, rest = glob[0], glob[1:]
    if first is STAR:
        return any(fits(rest, text[start:]) for start in range(len(text) + 1))
    if isinstance(first, str):
        return text.startswith(first) and fits(rest, text[len(first) :])
    return any(fits(option + rest, text) for option in first)


def stem(name):
    """What stands before the number at the end of a name, if there is one."""
    return name.rstrip("0123456789")


def numbered(node, before):
    """The pairs (number, child) of the children that are named with this stem and a number."""
    names = [name for name in node.children if name != before == stem(name)]
    return [(int(name.removeprefix(before)), node.children[name]) for name in names]


def underscored(node, name):
    """The family name_<i>, where a bare name (the first in Haiku) stands for the number 0."""
    found = numbered(node, name + "_")
    if found and 0 not in dict(found) and name in node.children:
        found.append((0, node.children[name]))
    return found


def order(node):
    """What a position counts: the layers, or the children, by number.

    The children have a number each if they have an order, or if all of them (or, with an order, all
    that it lists) are keyed by ints or named with one stem and a number, which comes first.
    """
    if node.layers is not None:
        return node.layers
    if node.hole:
        return {}  # nobody knows what stood there
    counted = node if node.order is None else node.listed()
    families = [numbered(counted, stem(name)) for name in counted.children]
    families += [underscored(counted, name) for name in counted.children if name]
    places = {} if node.order is None else dict(enumerate(counted.children.values()))
    return next((dict(f) for f in families if len(dict(f)) == len(counted.children)), places)


def at(numbers, position):
    """The numbers at a position, and whether missing numbers leave that unknown."""
    everything = range(max(numbers) + 1)
    gaps = not set(everything[1:]) <= set(numbers)  # counting from 1 leaves no gap at 0
    if not isinstance(position, slice):
        index = position if position >= 0 else position + len(everything)
        return [n for n in numbers if n == index], gaps and position < 0
    start, stop, step = position.start, position.stop, position.step or 1
    whole = position in (slice(None), slice(0, None), slice(None, None, 1), slice(0, None, 1))
    whole = whole or position == slice(None, None, -1)
    open_ended = (stop if step > 0 else start) is None and not whole
    negative = min(start or 0, stop or 0) < 0
    return [n for n in everything[position] if n in numbers], gaps and (open_ended or negative)


class Match:
    """What one structured target matches in a tree, and what went wrong on the way."""

    def __init__(self, root, parts):
        self.nodes = []
        # At places that were passed over: "position" (no order), "range", or "unmatched" (only
        # layers without parameters stand there).
        self.failures = set()
        self.unknowable = False
        self.holes = []  # where it could match something that has been cut out
        self.find(root, parts)
        self.holes += [node for node in self.nodes if node.hole]

    def find(self, node, parts):
        self.holes += [node] * node.hole  # what is left of the pattern could match in there
        if not parts:
            self.nodes += node.below()
            return
        part, rest = parts[0], parts[1:]
        if part is ...:
            self.find(node, rest)
            for child in node.children.values():
                self.find(child, parts)
        elif not isinstance(part, Name):
            self.pick_below(node, part, rest)
        elif part.at is None:
            for name, child in node.children.items():
                if fits(part.glob, name):
                    self.find(child, rest)
        else:
            if node.order is not None:
                node = dataclasses.replace(node, children=node.listed().children | node.children)
            known = {stem(name) for name in node.children}
            for name in {*node.children, *known, *(name.removesuffix("_") for name in known)}:
                if fits(part.glob, name):
                    self.find_indexed(node, name, part.at, rest)

    def find_indexed(self, node, name, position, rest):
        child = node.children.get(name)
        under, plain = underscored(node, name), numbered(node, name)
        if not name:
            under = plain = []  # children keyed by ints are no family of a name
        members = under or plain
        clear = not (under and plain) and len(dict(members)) == len(members)
        if child:
            self.holes += [node] * child.hole
        if child and (order(child) or child.layers is not None):
            self.pick_below(child, position, rest)
        elif child or members:
            self.pick(dict(members) if clear else {}, position, rest)

    def pick_below(self, node, position, rest):
        if node.layers == {}:  # nobody knows how many layers the holes of a stack had
            self.holes += [node] * all(below.leaf is None for below in node.below())
            self.failures.add("range")
        else:
            self.pick(order(node), position, rest)

    def pick(self, numbers, position, rest):
        if not numbers:
            self.failures.add("position")
            return
        chosen, unknowable = at(numbers, position)
        self.unknowable |= unknowable
        found = [numbers[number] for number in chosen if numbers[number] is not None]
        self.failures |= set() if found else {"unmatched"} if chosen else {"range"}
        for node in found:
            self.find(node, rest)


def everything(leaf):
    """Every element of an array; an empty array counts as one element."""
    return np.full(leaf.shape if leaf.size else (), True)


def along(leaf, axis, index):
    """The elements of an array whose place along an axis is in the index."""
    if not -leaf.ndim <= axis < leaf.ndim:
        raise FailedError("axis")
    chosen = places(index, leaf.shape[axis])
    if not leaf.size:
        return everything(leaf)
    return np.isin(np.indices(leaf.shape)[axis], chosen)


def places(index, size):
    """The places that an index stands for along an axis."""
    if isinstance(index, slice):
        chosen = [*range(size)[index]]
    elif isinstance(index, int):
        chosen = [index]
    elif isinstance(index, np.ndarray):
        if len(index) != size:
            raise FailedError("mask")
        chosen = [place for place in range(size) if index[place]]
    else:
        chosen = [*index]
    whole = not size  # any index that fits an axis without places is all of it
    if not all(-size <= place < size for place in chosen) or not (chosen or whole):
        raise FailedError("range")
    return [place % size for place in chosen]


def output_axis(name, shapes):
    """The axis of the output units in one array of a layer, by the names and shapes in it."""
    shape = shapes[name]
    last = len(shape) - 1
    if name == "weight":
        fit = [axis for axis, size in enumerate(shape) if (size,) == shapes.get("bias")]
        if len(fit) == 1:
            return fit[0]
    kernel = name in ("kernel", "w")
    beside = not {"kernel", "w"}.isdisjoint(shapes)  # attention: (heads, head size)
    if name in ("bias", "b", "scale", "offset") and shape and (last == 0 or beside):
        return last
    bias = shapes.get("bias" if name == "kernel" else "b", ())
    if kernel and len(bias) > 1 and shape[-len(bias) :] == bias:
        return last
    if kernel and shape and last < 2 and bias in ((), shape[-1:]):
        return last
    if kernel and last > 1 and len(bias) == 1 and shape[last - 1] != shape[last]:
        fit = [axis for axis in (last - 1, last) if shape[axis] == bias[0]]
        if fit:
            return fit[0]
    raise FailedError("axis")


def given_axis(shape, most, axis):
    """The axis of an array that goes with a given axis of the array that has the most."""
    if shape and -most <= axis < most:
        if len(shape) == 1:
            return 0
        if axis % most - most >= -len(shape):
            return axis % most - most + len(shape)
    raise FailedError("axis")


def neurons(path, selected, leaves, axis, index):
    """The elements of output units; all that is selected in a layer has the same number of them."""
    held = {other: leaf for other, leaf in leaves.items() if other[:-1] == path[:-1]}
    # Names and ranks are those of one layer, where layers are stacked.
    free = {
        path: [axis for axis in range(leaf.leaf.ndim) if axis not in leaf.stacks]
        for path, leaf in held.items()
    }
    shapes = {path: tuple([held[path].leaf.shape[a] for a in free[path]]) for path in held}
    names = {"".join(path[-1:]): shape for path, shape in shapes.items()}
    if axis is not None:
        largest = max(held, key=lambda path: held[path].leaf.ndim)
        rank = held[largest].leaf.ndim
        if not -rank <= axis < rank or axis % rank not in free[largest]:
            raise FailedError("axis")
        axis = free[largest].index(axis % rank)
    masks, sizes, failures = {}, set(), []
    for other in held:
        if other in selected:
            try:
                if axis is None:
                    place = output_axis("".join(other[-1:]), names)
                else:
                    place = given_axis(shapes[other], max(map(len, free.values())), axis)
                sizes.add(shapes[other][place])
                masks[other] = along(held[other].leaf, free[other][place], index)
            except FailedError as error:
                failures += error.args
    if len(sizes) > 1:
        failures.append("axis")
    if failures:
        raise FailedError(*failures)
    return masks[path]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a target selects, and what stood in the way of more.

    Attributes:
        masks: the elements by the path of their array.
        wild: whether arrays that have no such axis or place are passed over.
        holes: where it could match something that has been cut out.
        nodes: what it matches as a whole.
        skipped: the kinds of what was passed over.
        problems: the kinds of what must not be passed over.
    """

    masks: dict
    wild: bool
    holes: set
    nodes: set
    skipped: set
    problems: set


def select(target, root, leaves):
    """Find what a target selects, given the arrays by every path that they have."""
    if isinstance(target, Along | Neurons | Elements):
        return select_part(target, select(target.target, root, leaves), leaves)
    if isinstance(target, tuple):
        match = Match(root, target)
        masks = {}
        for node in match.nodes:
            if node.leaf is not None:
                masks[node.path] = masks.get(node.path, False) | node.cells()
        skipped = set() if masks else match.failures
        problems = {"position"} if match.unknowable else set()
        holes, nodes = ({(n.path, n.where) for n in each} for each in (match.holes, match.nodes))
        return Found(masks, is_wild(target), holes, nodes, skipped, problems)
    masks = {}
    for path, node in leaves.items():
        text = "/".join(path)
        if target.fullmatch(text) if isinstance(target, re.Pattern) else target(text, node.leaf):
            masks[path] = everything(node.leaf)
    holes = {(node.path, node.where) for node in root.below() if node.hole}
    return Found(masks, True, holes, set(), set(), set())


def is_wild(parts):
    """Whether a structure has wildcards; braces that leave no choice are none."""
    return ... in parts or any(
        isinstance(part, Name) and len(spelled(part.glob)) != 1 for part in parts
    )


def spelled(glob):
    """The texts that a glob fits; none if it has a star, as if they were too many."""
    texts = {""}
    for piece in glob:
        if piece is STAR:
            return set()
        options = {piece} if isinstance(piece, str) else [spelled(option) for option in piece]
        if not isinstance(piece, str):
            options = set().union(*options) if all(options) else set()
        texts = {text + option for text in texts for option in options}
    return texts


def select_part(target, whole, leaves):
    """The part of what another target selects."""
    masks, skipped, problems = {}, set(whole.skipped), set(whole.problems)
    for path, mask in whole.masks.items():
        leaf = leaves[path].leaf
        try:
            masks[path] = mask & part(target, path, leaf, whole.masks, leaves)
        except FailedError as error:
            hard = {"mask"} if isinstance(target, Along) else {"mask", "axis"}
            hard = hard if whole.wild else {"mask", "axis", "range"}
            skipped |= {*error.args} - hard
            if hard & {*error.args}:
                problems |= hard & {*error.args}
                masks[path] = mask  # more may be wrong with it
    return dataclasses.replace(whole, masks=masks, nodes=set(), skipped=skipped, problems=problems)


def part(target, path, leaf, selected, leaves):
    """The part of one array."""
    if isinstance(target, Elements):
        if target.mask.shape != leaf.shape:
            raise FailedError("mask")
        return target.mask if leaf.size else everything(leaf)
    if isinstance(target, Neurons):
        return neurons(path, selected, leaves, target.axis, target.index)
    return along(leaf, target.axis, target.index)


def interpret(rules, tree, stacked=(), order=(), shared=()):
    """Interpret (target, multiplier, optional) rules.

    Returns:
        The indices of the claiming rules, an array per leaf in the order of `jax.tree.leaves`, with
        -1 where no rule claims; and per rule the verdicts that are right: "ok", "unmatched",
        "shadowed", "position" (no order, or not to be known), "range", "axis", or "mask". There are
        several where a rule is wrong in several ways.
    """
    root, leaves = grow(tree, stacked, order, shared)
    claims = {leaf.path: np.where(everything(leaf.leaf), -1, 0) for leaf in leaves}
    leaves = {node.path: node for node in root.below() if node.leaf is not None}
    ties = {path: group for group in joined(shared) for path in group}
    verdicts, history = [], []
    covered = set()  # where earlier rules claim all, in holes too
    for index, (target, _, optional) in enumerate(rules):
        found = select(target, root, leaves)
        history.append({} if found.problems else found.masks)
        if found.problems:
            forgiven = {"range"} if optional else set()
            verdicts.append({"ok" if kind in forgiven else kind for kind in found.problems})
            continue
        fresh = overruled = False
        for path, claim in claims.items():
            paths = ties.get(path, {path})
            matched = [found.masks[path] for path in paths if path in found.masks]
            matched = np.any(matched, axis=0) if matched else np.zeros(claim.shape, bool)
            for winner in {*claim[matched]} - {-1}:
                both = [
                    found.masks[path] & history[winner][path]
                    for path in paths
                    if path in found.masks and path in history[winner]
                ]
                lost = matched & (claim == winner)
                overruled |= bool((lost & ~np.any(both, axis=0) if both else lost).any())
            fresh |= bool((matched & (claim == -1)).any())
            claim[matched & (claim == -1)] = index
        last = all(optional for _, _, optional in rules[index:][1:])
        closing = last and isinstance(target, tuple) and all(part is ... for part in target)
        matches = any(mask.any() for mask in found.masks.values())
        holes = found.holes - covered if matches else found.holes
        in_hole = any(path not in ties for path, _ in holes)
        covered |= found.nodes
        if fresh or overruled or in_hole or closing:
            verdict = {"ok"}
        elif matches:
            verdict = {"shadowed"}
        elif "unmatched" in found.skipped:
            verdict = {"unmatched", *(found.skipped & {"range"})}
        else:
            # What was passed over is wrong if nothing is left; or the arrays that are left are.
            missing = [kind for kind in ("range", "axis", "position") if kind in found.skipped]
            verdict = {*missing[:1], *(["unmatched"] if found.masks or not missing else [])}
        if holes:  # those of shared arrays: what stood there is known, but may be forgiven too
            verdict = {*verdict, "ok"}
        forgiven = {"range", "unmatched", "shadowed"} if optional else set()
        verdicts.append({"ok" if kind in forgiven else kind for kind in verdict})
    return list(claims.values()), verdicts


def errors(verdicts, passed=()):
    """The kinds of error of which one must be raised; "ok" among them if none need be."""
    kinds = set()
    for verdict in verdicts:
        kinds |= verdict - {"ok", *passed}
        if not verdict & {"ok", *passed}:
            return kinds
    return kinds | {"ok"}


def dense(claims, values):
    """What each element gets from the rule that claims it, by the rule's index; 1 without one."""
    return np.array([1.0, *values])[claims + 1]
