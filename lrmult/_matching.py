"""Which rules match which arrays: all rules at once, in one walk over the tree."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lrmult._automaton import Automaton, bits
from lrmult._errors import (
    LrmultError,
    PositionError,
    RuleError,
    UnmatchedRuleError,
    listing,
    shorten,
    show,
)
from lrmult._of_type import OfType
from lrmult._orders import Orders
from lrmult._paths import ParamTree
from lrmult._patterns import Pattern, show_position
from lrmult._positions import UnknowablePositionError, base_names, stems
from lrmult._regions import Region, boxes
from lrmult._targets import Selector


@dataclasses.dataclass
class Matches:
    """What the rules of a list match in a tree.

    Attributes:
        rows: per leaf of the tree, the indices of the rules that match it or part of it, in order.
        slices: by leaf and rule, the parts that a rule matches, where positions lead it to some
            layers of a stack only.
        routes: per array with several paths, the nodes at their ends, and the rules that match
            there.
        in_holes: the rules that could match inside a hole of the tree; for each such hole, the
            rules that match all that may be in it.
        unresolved: per rule, a position in it that names nothing at some place.
        errors: per rule, why what it matches cannot be told.
    """

    rows: list[tuple[int, ...]]
    slices: dict[tuple[int, int], list[Region]]
    routes: dict[int, dict[int, tuple[int, ...]]]
    in_holes: dict[int, set[tuple[int, ...]]]
    unresolved: dict[int, LrmultError]
    errors: dict[int, LrmultError]


def match(selectors: Sequence[Selector], tree: ParamTree) -> Matches:
    """Match every rule against every array of a tree."""
    automaton = Automaton(selectors)
    walk = _Walk(automaton, tree)
    walk.run()
    for rule, selector in enumerate(selectors):
        if isinstance(selector, OfType):
            walk.add(rule, selector)
    others = {r: s for r, s in enumerate(selectors) if not isinstance(s, Pattern | OfType)}
    arrays = [_Asked(tree, leaf, node) for leaf, node in tree.arrays()] if others else []
    if others:
        aliases = tree.aliases.items()
        arrays += [_Asked(tree, leaf, node) for leaf, nodes in aliases for node in nodes]
    for rule, selector in others.items():
        try:
            for array in arrays:
                if array.is_selected(selector):
                    node = array.node
                    walk.matched[node] = walk.merge(walk.matched[node], (rule,))
        except RuleError as error:
            walk.errors[rule] = error
    for node in tree.holes:
        for rule in (*walk.matched[node], *automaton.rules_of(walk.waiting_in_hole(node))):
            walk.note_hole(rule, node)
        for rule, selector in others.items():
            if isinstance(selector, re.Pattern) and node not in tree.cut and node in tree.nodes:
                if selector.fullmatch(tree.raw_text(node)):
                    walk.note_hole(rule, node)
            else:  # what it would say of something that is not there cannot be asked
                walk.note_hole(rule, node)
    rows = [() if node is None else walk.matched[node] for node in tree.places]
    routes: dict[int, dict[int, tuple[int, ...]]] = {}
    for leaf, nodes in tree.aliases.items():
        routes[leaf] = {node: walk.matched[node] for node in (tree.places[leaf] or 0, *nodes)}
        for matched in routes[leaf].values():
            rows[leaf] = walk.merge(rows[leaf], matched)
        for copy in tree.slices.get(leaf, ()):  # parts of it, by the same paths
            end = tree.without_layers(copy)
            routes[leaf][end] = walk.merge(routes[leaf].get(end, ()), walk.matched[copy])
    slices: dict[tuple[int, int], list[Region]] = {}
    for leaf in tree.slices:
        found = _slices(leaf, rows[leaf], walk.matched, tree)
        slices |= {(leaf, rule): regions for rule, regions in found.items()}
        rows[leaf] = walk.merge(rows[leaf], tuple(sorted(found)))
    return Matches(
        rows=rows,
        slices=slices,
        routes=routes,
        in_holes=walk.in_holes,
        unresolved=walk.unresolved,
        errors=walk.errors,
    )


def _slices(
    leaf: int, whole: tuple[int, ...], matched: Sequence[tuple[int, ...]], tree: ParamTree
) -> dict[int, list[Region]]:
    """The parts of an array, by rule, that rules match only as layers of a stack."""
    copies = tree.slices[leaf]
    axes = sorted({axis for at in copies.values() for axis in at})
    grids: dict[int, Any] = {}
    for node, at in copies.items():
        for rule in matched[node]:
            if rule not in whole:
                sizes = [tree.shapes[leaf][axis] for axis in axes]
                grid = grids.setdefault(rule, np.zeros(sizes, np.bool_))
                grid[tuple(at.get(axis, slice(None)) for axis in axes)] = True
    return {rule: boxes(grid, axes) for rule, grid in grids.items()}


def find(pattern: Pattern, tree: ParamTree) -> list[int]:
    """The nodes at which a pattern matches, without those below them."""
    walk = _Walk(Automaton([pattern]), tree)
    walk.run()
    return [
        node
        for node, above in enumerate(tree.parents)
        if walk.matched[node] and (not node or not walk.matched[above])
    ]


class _Asked:
    """An array, as regular expressions and predicates are asked about it."""

    def __init__(self, tree: ParamTree, index: int, node: int) -> None:
        self.node = node
        self._raw_text = tree.raw_text(node)
        self._path = tree.text(node)
        self._leaf = jax.ShapeDtypeStruct(tree.shapes[index], tree.dtypes[index])

    def is_selected(self, selector: Any) -> bool:
        """The answer of a regular expression or a predicate."""
        if isinstance(selector, re.Pattern):
            return selector.fullmatch(self._raw_text) is not None
        try:
            answer = selector(self._path, self._leaf)
        except Exception as error:
            raise RuleError(
                f"its predicate raised {type(error).__name__} for the array "
                f"{shorten(self._path)!r}: {shorten(str(error))}; a predicate takes (path: str, "
                "leaf: jax.ShapeDtypeStruct) and returns a bool"
            ) from error
        if isinstance(answer, bool | np.bool_):
            return bool(answer)
        raise RuleError(
            f"its predicate returned {show(answer)} for the array {shorten(self._path)!r}; return "
            "True or False"
        )


class _Walk:
    """One run of the automaton over a tree, from the root downwards."""

    def __init__(self, automaton: Automaton, tree: ParamTree) -> None:
        self.automaton = automaton
        self.tree = tree
        self.active = [0] * len(tree.names)  # per node, the states that wait there
        # Per node, the rules that match it or a node above it.
        self.matched: list[tuple[int, ...]] = [()] * len(tree.names)
        self.in_holes: dict[int, set[tuple[int, ...]]] = {}
        self.unresolved: dict[int, LrmultError] = {}
        self.errors: dict[int, LrmultError] = {}
        self._resolved: dict[int, int] = {}  # node -> the states that a position leads to there
        self._accepted: dict[int, tuple[int, ...]] = {}  # the rules of accepting states
        self._merged: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]] = {}
        self._orders = Orders(tree)

    def run(self) -> None:
        """Visit every node."""
        automaton, active, matched = self.automaton, self.active, self.matched
        names = [*self.tree.names, *itertools.chain.from_iterable(self.tree.order.values())]
        if automaton.indexed:
            names = [*names, *itertools.chain.from_iterable(map(base_names, stems(names)))]
        expecting = automaton.expecting(names)
        unaccepting = ~automaton.accept
        self._arrive(0, automaton.close(automaton.start), ())
        stacks, resolved = self.tree.layers, self._resolved
        for node, children in enumerate(self.tree.children):
            states = active[node]
            if not children and not states & automaton.at and node not in stacks:
                continue
            for bit in bits(states & automaton.at):
                self._follow(node, None, bit)
            by_name = states & automaton.indexed
            if by_name:
                for name in self._orders.countable(node):
                    for bit in bits(by_name & expecting[name]):
                        self._follow(node, name, bit)
                states ^= by_name
            # What stays active below whatever the children are called.
            lasting = automaton.close(states & automaton.any_depth) & unaccepting
            known = matched[node]
            for layer in stacks[node].values() if node in stacks else ():
                if layer in resolved:
                    self._arrive(layer, automaton.close(resolved[layer]), known)
            for name, child in children.items():
                moving = states & expecting[name]
                if moving or child in resolved:
                    reached = moving << 1 | resolved.get(child, 0)
                    self._arrive(child, lasting | automaton.close(reached), known)
                else:
                    active[child] = lasting
                    matched[child] = known

    def add(self, rule: int, selector: OfType) -> None:
        """Note what a rule matches that names nodes by their exact paths."""
        lines = [list(self.tree.nodes_along(path)) for path in selector.paths]
        ends = {
            line[-1]
            for line, path in zip(lines, selector.paths, strict=True)
            if len(line) > len(path)
        }
        for node, above in enumerate(self.tree.parents):
            if node in ends or (node and above in ends):
                ends.add(node)
                self.matched[node] = self.merge(self.matched[node], (rule,))
        for node in self.tree.holes.intersection(itertools.chain(ends, *lines)):
            self.note_hole(rule, node)

    def note_hole(self, rule: int, node: int) -> None:
        """Note that a rule could match inside a hole, which lies at or below a node."""
        self.in_holes.setdefault(rule, set()).add(self.matched[node])

    def _arrive(self, node: int, states: int, known: tuple[int, ...]) -> None:
        accepted = states & self.automaton.accept
        self.active[node] = states ^ accepted
        if accepted:
            rules = self._accepted.get(accepted)
            if rules is None:
                rules = self._accepted[accepted] = tuple(self.automaton.rules_of(accepted))
            known = self.merge(known, rules) if known else rules
        self.matched[node] = known

    def waiting_in_hole(self, node: int) -> int:
        """The states that could go on inside a hole of the tree.

        Where a hole stands for one array, those do not count that wait everywhere below a `**`:
        no typo after a `**` would ever show in a module with a None.
        """
        if node in self.tree.cut:
            return self.active[node]
        above = self.active[self.tree.parents[node]]
        return self.active[node] & ~self.automaton.close(above & self.automaton.any_depth)

    def merge(self, rules: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
        """Both in order; equal results are one object."""
        key = rules, more
        merged = self._merged.get(key)
        if merged is None:
            merged = self._merged[key] = tuple(sorted({*rules, *more}))
        return merged

    def _follow(self, node: int, name: str | None, bit: int) -> None:
        """Follow one position from a node to the nodes that it means."""
        [rule] = self.automaton.rules_of(bit)
        try:
            if name is not None and self.tree.children[node].get(name) in self.tree.holes:
                self.note_hole(rule, node)
            above, children, family = self._orders.counted(node, name)
            if family is None:
                return
            what = repr(shorten(self.tree.text(above))) if above else "the root"
            if name is not None and above == node:
                what = f"the family {shorten(name)!r} {'below' if above else 'at'} {what}"
            position = self.automaton.positions[bit]
            members = family.select(position, what)
            for member in members:
                if member in children:
                    below = children[member]
                    self._resolved[below] = self._resolved.get(below, 0) | bit << 1
            if children.keys().isdisjoint(members):
                others = [name for name in family.members.values() if name in children]
                has, have = ("has" if len(each) == 1 else "have" for each in (members, others))
                raise UnmatchedRuleError(
                    f"{show_position(position)} of {what} is {listing(members)}, which {has} no "
                    "parameters here" + (f"; {listing(others, 4)} {have} some" if others else "")
                )
        except UnknowablePositionError as error:
            self.errors.setdefault(rule, PositionError(str(error)))
        except (PositionError, UnmatchedRuleError) as error:
            # A place without an order, or without that position, is passed over, and matters only
            # if the rule matches nothing. Out of range says more than no order.
            known = self.unresolved.setdefault(rule, error)
            if type(known) is PositionError and type(error) is not PositionError:
                self.unresolved[rule] = error
