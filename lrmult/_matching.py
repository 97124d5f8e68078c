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


class _State(dict[str, "_State"]):
    """What is known at a node of a tree; by name, the states of children that have been asked for.

    Attributes:
        waiting: the states of the automaton that wait there.
        matched: the rules that match the node or one above it.
        lasting: the state of a child that nothing waits for by its name.
        is_asking: whether a position is to be followed from there.
    """

    __slots__ = ("is_asking", "lasting", "matched", "waiting")

    waiting: int
    matched: tuple[int, ...]
    lasting: "_State"
    is_asking: bool


class _Walk:
    """One run of the automaton over a tree, from the root downwards.

    Nodes at which the same is known share one state, so that most nodes are looked up by their name
    in the state above them.
    """

    def __init__(self, automaton: Automaton, tree: ParamTree) -> None:
        self.automaton = automaton
        self.tree = tree
        self.matched: list[tuple[int, ...]] = []  # per node
        self.in_holes: dict[int, set[tuple[int, ...]]] = {}
        self.unresolved: dict[int, LrmultError] = {}
        self.errors: dict[int, LrmultError] = {}
        self._at: list[_State] = []  # per node
        self._states: dict[tuple[int, tuple[int, ...]], _State] = {}
        self._expecting: dict[str, int] = {}
        self._moving = ~automaton.indexed  # the states that a name alone leads on from
        self._resolved: dict[int, int] = {}  # node -> the states that a position leads to there
        self._accepted: dict[int, tuple[int, ...]] = {}  # the rules of accepting states
        self._merged: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]] = {}
        self._orders = Orders(tree)

    def run(self) -> None:
        """Visit every node."""
        automaton, tree = self.automaton, self.tree
        names = [*tree.names, *itertools.chain.from_iterable(tree.order.values())]
        if automaton.indexed:
            names = [*names, *itertools.chain.from_iterable(map(base_names, stems(names)))]
        expecting = self._expecting = automaton.expecting(names)
        apart = self._resolved  # the nodes that are more than the children of that name above
        apart.update((layer, 0) for layers in tree.layers.values() for layer in layers.values())
        root = self._arrive(automaton.close(automaton.start), ())
        at = self._at = [root]
        if root.is_asking:
            self._ask(0, root)
        for node, (name, parent) in enumerate(zip(tree.names, tree.parents, strict=True)):
            if not node:
                continue
            above = at[parent]
            if node in apart:
                state = self._enter_apart(node, above, name)
            elif (found := above.get(name)) is not None:
                state = found
            else:
                state = self._enter(above, name) if name in expecting else above.lasting
            at.append(state)
            if state.is_asking:
                self._ask(node, state)
        self.matched = [state.matched for state in at]

    def _enter(self, above: _State, name: str, resolved: int = 0) -> _State:
        """The state of a child; `resolved` are the states that positions lead to there."""
        moving = above.waiting & self._moving & self._expecting.get(name, 0)
        if not (moving or resolved):
            state = above.lasting
        else:
            reached = self.automaton.close(moving << 1 | resolved)
            state = self._arrive(above.lasting.waiting | reached, above.matched)
        if not resolved:
            above[name] = state
        return state

    def _enter_apart(self, node: int, above: _State, name: str) -> _State:
        """The state of a node that positions lead to, be it a child or a layer of a stack."""
        resolved = self._resolved[node]
        if not self.tree.is_layer(node):
            return self._enter(above, name, resolved)
        if resolved:
            return self._arrive(self.automaton.close(resolved), above.matched)
        return self._arrive(0, ())

    def _arrive(self, states: int, known: tuple[int, ...]) -> _State:
        """The state where some states of the automaton are reached below what is known."""
        automaton = self.automaton
        accepted = states & automaton.accept
        if accepted:
            rules = self._accepted.get(accepted)
            if rules is None:
                rules = self._accepted[accepted] = tuple(automaton.rules_of(accepted))
            known = self.merge(known, rules) if known else rules
        key = states ^ accepted, known
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = _State()
            state.waiting, state.matched = key
            state.is_asking = bool(state.waiting & (automaton.at | automaton.indexed))
            # What stays active below whatever the children are called.
            lasting = automaton.close(state.waiting & automaton.any_depth) & ~automaton.accept
            state.lasting = state if lasting == state.waiting else self._arrive(lasting, known)
        return state

    def _ask(self, node: int, state: _State) -> None:
        """Follow the positions that are asked of a node."""
        automaton = self.automaton
        for bit in bits(state.waiting & automaton.at):
            self._follow(node, None, bit)
        by_name = state.waiting & automaton.indexed
        for name in self._orders.countable(node) if by_name else ():
            for bit in bits(by_name & self._expecting.get(name, 0)):
                self._follow(node, name, bit)

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
        matched = self.matched[node] if self.matched else self._at[node].matched
        self.in_holes.setdefault(rule, set()).add(matched)

    def waiting_in_hole(self, node: int) -> int:
        """The states that could go on inside a hole of the tree.

        Where a hole stands for one array, those do not count that wait everywhere below a `**`:
        no typo after a `**` would ever show in a module with a None.
        """
        state = self._at[node]
        if node in self.tree.cut:
            return state.waiting
        above = self._at[self.tree.parents[node]].waiting
        return state.waiting & ~self.automaton.close(above & self.automaton.any_depth)

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
