"""A naive interpreter of the rule language, slow and obvious, written from the contract alone.

It reads no text: a target is given by its structure, which the tests render to text for the package
to parse. A structure is a tuple of parts:

* ``Name(glob, at)``: one segment that fits the glob; with a position, the child of that node at the
  position, or the member of the family of that name;
* ``...``: any number of segments;
* an int or a slice: children by position.

A glob is a tuple of pieces: a literal str, `STAR`, or a list of globs of which any may fit. Instead
of a structure, a target may be a compiled regular expression or a predicate, as in the package.
"""

import dataclasses
import re
from typing import Any

STAR = None


@dataclasses.dataclass(frozen=True)
class Name:
    glob: tuple
    at: Any = None


@dataclasses.dataclass(eq=False)
class Node:
    path: tuple
    children: dict = dataclasses.field(default_factory=dict)
    leaf: Any = None
    hole: bool = False

    def below(self):
        """This node and all below it."""
        return [self, *(node for child in self.children.values() for node in child.below())]


class RefusedError(Exception):
    """Two leaves of one path, or a leaf above another: rules cannot speak of such a tree."""


def grow(tree):
    """Turn containers into nodes by segment; the root, and the leaves as `jax.tree.leaves` does."""
    root, leaves = Node(()), []
    _grow(root, tree, leaves)
    for leaf in leaves:
        if leaf.children:
            raise RefusedError(leaf.path)
    return root, leaves


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
    """The children by number, if all are keyed by ints or named with one stem and a number."""
    families = [numbered(node, stem(name)) for name in node.children]
    families += [underscored(node, name) for name in node.children if name]
    return next((dict(f) for f in families if len(dict(f)) == len(node.children)), {})


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
        self.failures = set()  # at places that were passed over: "position" (no order), "range"
        self.unknowable = False
        self.in_hole = False
        self.find(root, parts)
        self.in_hole |= any(node.hole for node in self.nodes)

    def find(self, node, parts):
        self.in_hole |= node.hole  # what is left of the pattern could match in there
        if not parts:
            self.nodes += node.below()
            return
        part, rest = parts[0], parts[1:]
        if part is ...:
            self.find(node, rest)
            for child in node.children.values():
                self.find(child, parts)
        elif not isinstance(part, Name):
            self.pick(order(node), part, rest)
        elif part.at is None:
            for name, child in node.children.items():
                if fits(part.glob, name):
                    self.find(child, rest)
        else:
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
            self.in_hole |= child.hole
        if child and order(child):
            self.pick(order(child), position, rest)
        elif child or members:
            self.pick(dict(members) if clear else {}, position, rest)

    def pick(self, numbers, position, rest):
        if not numbers:
            self.failures.add("position")
            return
        chosen, unknowable = at(numbers, position)
        self.unknowable |= unknowable
        self.failures |= set() if chosen else {"range"}
        for number in chosen:
            self.find(numbers[number], rest)


def interpret(rules, tree):
    """Interpret (target, multiplier, optional) rules.

    Returns:
        The multipliers and the indices of the claiming rules, in the order of `jax.tree.leaves`,
        and per rule "ok", "unmatched", "shadowed", "position" (no order, or not to be known), or
        "range".
    """
    root, leaves = grow(tree)
    any_hole = any(node.hole for node in root.below())
    claims = dict.fromkeys(leaves)
    verdicts = []
    for index, (target, _, optional) in enumerate(rules):
        failures, unknowable, forgiven, closing = set(), False, any_hole, False
        if isinstance(target, re.Pattern):
            found = [leaf for leaf in leaves if target.fullmatch("/".join(leaf.path))]
        elif callable(target):
            found = [leaf for leaf in leaves if target("/".join(leaf.path), leaf.leaf)]
        else:
            match = Match(root, target)
            found = [node for node in match.nodes if node.leaf is not None]
            failures, unknowable, forgiven = match.failures, match.unknowable, match.in_hole
            last = all(optional for _, _, optional in rules[index:][1:])
            closing = last and all(part is ... for part in target)
        fresh = [leaf for leaf in found if claims[leaf] is None]
        claims.update(dict.fromkeys(fresh, index))
        if unknowable:
            verdict = "position"
        elif found:
            verdict = "ok" if fresh or closing or optional or forgiven else "shadowed"
        elif forgiven or closing:
            verdict = "ok"
        elif failures == {"position"}:
            verdict = "position"
        else:
            verdict = "ok" if optional else "range" if failures else "unmatched"
        verdicts.append(verdict)
    multipliers = [1.0 if i is None else float(rules[i][1] or 0.0) for i in claims.values()]
    return multipliers, list(claims.values()), verdicts
