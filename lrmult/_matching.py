"""Which rules match which arrays: all rules at once, in one walk over the tree.

The steps of all patterns are states of one nondeterministic automaton, and a set of states is the
bits of one Python int (the Shift-And method of Baeza-Yates and Gonnet, 1992). Moving down by one
segment costs a few operations on such ints, whatever the number of rules.
"""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lrmult._errors import (
    IndexRangeError,
    LrmultError,
    PositionError,
    RuleError,
    shorten,
    show,
)
from lrmult._paths import ParamTree
from lrmult._patterns import At, Glob, Indexed, Names, Pattern, Position, Step
from lrmult._positions import (
    Family,
    UnknowablePositionError,
    base_names,
    family_of,
    order_of,
    stems,
)
from lrmult._rules import Selector


@dataclasses.dataclass
class Matches:
    """What the rules of a list match in a tree.

    Attributes:
        rows: per leaf of the tree, the indices of the rules that match it, in order.
        in_holes: the rules that could match inside a hole of the tree.
        unresolved: per rule, a position in it that names nothing at some place.
        errors: per rule, why what it matches cannot be told.
    """

    rows: list[tuple[int, ...]]
    in_holes: set[int]
    unresolved: dict[int, PositionError]
    errors: dict[int, LrmultError]


def match(selectors: Sequence[Selector], tree: ParamTree) -> Matches:
    """Match every rule against every array of a tree."""
    automaton = _Automaton(selectors)
    walk = _Walk(automaton, tree)
    walk.run()
    others = {r: s for r, s in enumerate(selectors) if not isinstance(s, Pattern)}
    arrays = [_Asked(tree, index, node) for index, node in tree.arrays()] if others else []
    for rule, selector in others.items():
        try:
            for array in arrays:
                if array.is_selected(selector):
                    node = array.node
                    walk.matched[node] = walk.merge(walk.matched[node], (rule,))
        except RuleError as error:
            walk.errors[rule] = error
    for node in tree.holes:
        walk.in_holes.update(walk.matched[node], automaton.rules_of(walk.waiting_in_hole(node)))
        for rule, selector in others.items():
            if isinstance(selector, re.Pattern) and node not in tree.cut:
                if selector.fullmatch(tree.raw_text(node)):
                    walk.in_holes.add(rule)
            else:  # what it would say of something that is not there cannot be asked
                walk.in_holes.add(rule)
    return Matches(
        rows=[() if node is None else walk.matched[node] for node in tree.places],
        in_holes=walk.in_holes,
        unresolved=walk.unresolved,
        errors=walk.errors,
    )


def find(pattern: Pattern, tree: ParamTree) -> list[int]:
    """The nodes at which a pattern matches, without those below them."""
    walk = _Walk(_Automaton([pattern]), tree)
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


def _bits(states: int) -> Iterator[int]:
    """The bits of a set of states, lowest first."""
    while states:
        bit = states & -states
        yield bit
        states ^= bit


class _Automaton:
    """The states of all patterns: one for each step, waiting for it, and one that accepts."""

    def __init__(self, selectors: Sequence[Selector]) -> None:
        self.start = 0
        self.accept = 0
        self.any_depth = 0
        self.indexed = 0  # those that wait for name[position]
        self.at = 0  # those that wait for [position]
        self.positions: dict[int, Position] = {}  # of either, by the bit of the state
        self.accepting: list[int] = []  # rule -> the bit of the state in which it has matched
        self._owner: list[int] = []  # state -> rule
        self._literals: dict[str, int] = {}
        self._globs: dict[Glob, int] = {}
        for rule, selector in enumerate(selectors):
            if isinstance(selector, Pattern):
                self.start |= 1 << len(self._owner)
                for step in selector.steps:
                    self._add(step, 1 << len(self._owner))
                    self._owner.append(rule)
            self.accepting.append(1 << len(self._owner))
            self.accept |= self.accepting[-1]
            self._owner.append(rule)

    def _add(self, step: Step, bit: int) -> None:
        if isinstance(step, At):
            self.at |= bit
            self.positions[bit] = step.position
        elif isinstance(step, Names):
            self._add_names(step, bit)
        elif isinstance(step, Indexed):
            self.indexed |= bit
            self.positions[bit] = step.position
            self._add_names(step.names, bit)
        else:
            self.any_depth |= bit

    def _add_names(self, names: Names, bit: int) -> None:
        for name in names.literals:
            self._literals[name] = self._literals.get(name, 0) | bit
        for glob in names.globs:
            self._globs[glob] = self._globs.get(glob, 0) | bit

    def rules_of(self, states: int) -> Iterator[int]:
        """The rules that some states belong to, in order."""
        last = -1
        for bit in _bits(states):
            rule = self._owner[bit.bit_length() - 1]
            if rule != last:
                yield rule
            last = rule

    def close(self, states: int) -> int:
        """Add what is reached without a segment: `**` may stand for none."""
        return states | (states & self.any_depth) << 1

    def expecting(self, names: Iterable[str]) -> dict[str, int]:
        """For each name, the states that wait for that name, with a position or without."""
        vocabulary = _Vocabulary(names)
        expecting = dict.fromkeys(vocabulary.names, 0)
        for name in self._literals.keys() & expecting.keys():
            expecting[name] = self._literals[name]
        for glob, states in self._globs.items():
            for name in vocabulary.matching(glob):
                expecting[name] |= states
        return expecting


class _Vocabulary:
    """The distinct names of a tree, in order and as one text, so that a glob is tried on few."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(set(names))
        self._text = "\0".join(["", *self.names, ""])
        lengths = (len(name) + 1 for name in self.names)
        self._starts = list(itertools.accumulate(lengths, initial=0))

    def matching(self, glob: Glob) -> Iterator[str]:
        """The names that match a glob."""
        return filter(glob.match, self._candidates(glob))

    def _candidates(self, glob: Glob) -> Iterator[str]:
        first, *_, last = glob.parts
        longest = max(glob.parts, key=len)
        if first or not longest:
            start = bisect.bisect_left(self.names, first)
            yield from itertools.takewhile(
                lambda name: name.startswith(first), itertools.islice(self.names, start, None)
            )
            return
        needle = f"{last}\0" if last else longest
        if "\0" in longest:  # a name might hold the separator itself
            yield from self.names
            return
        at = self._text.find(needle)
        while at >= 0:
            index = bisect.bisect_right(self._starts, at) - 1
            yield self.names[index]
            at = self._text.find(needle, self._starts[index + 1])


class _Walk:
    """One run of the automaton over a tree, from the root downwards."""

    def __init__(self, automaton: _Automaton, tree: ParamTree) -> None:
        self.automaton = automaton
        self.tree = tree
        self.active = [0] * len(tree.names)  # per node, the states that wait there
        # Per node, the rules that match it or a node above it.
        self.matched: list[tuple[int, ...]] = [()] * len(tree.names)
        self.in_holes: set[int] = set()
        self.unresolved: dict[int, PositionError] = {}
        self.errors: dict[int, LrmultError] = {}
        self._resolved: dict[int, int] = {}  # node -> the states that a position leads to there
        self._merged: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]] = {}
        self._orders: dict[int, Family | PositionError] = {}
        self._groups: dict[int, dict[str, list[str]]] = {}

    def run(self) -> None:
        """Visit every node."""
        automaton, active, matched = self.automaton, self.active, self.matched
        names = self.tree.names
        if automaton.indexed:
            names = [*names, *itertools.chain.from_iterable(map(base_names, stems(names)))]
        expecting = automaton.expecting(names)
        unaccepting = ~automaton.accept
        self._arrive(0, automaton.close(automaton.start), ())
        for node, children in enumerate(self.tree.children):
            states = active[node]
            if not children and not states & automaton.at:
                continue
            for bit in _bits(states & automaton.at):
                self._follow(node, None, bit)
            by_name = states & automaton.indexed
            if by_name:
                for name in self._countable(node):
                    for bit in _bits(by_name & expecting[name]):
                        self._follow(node, name, bit)
                states ^= by_name
            # What stays active below whatever the children are called.
            lasting = automaton.close(states & automaton.any_depth) & unaccepting
            known = matched[node]
            for name, child in children.items():
                moving = states & expecting[name]
                if moving or child in self._resolved:
                    reached = moving << 1 | self._resolved.get(child, 0)
                    self._arrive(child, lasting | automaton.close(reached), known)
                else:
                    active[child] = lasting
                    matched[child] = known

    def _arrive(self, node: int, states: int, known: tuple[int, ...]) -> None:
        accepted = states & self.automaton.accept
        self.active[node] = states ^ accepted
        rules = tuple(self.automaton.rules_of(accepted))
        self.matched[node] = self.merge(known, rules) if rules else known

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
            above, family = self._family(node, name, rule)
            if family is None:
                return
            what = repr(shorten(self.tree.text(above))) if above else "the root"
            if name is not None and above == node:
                what = f"the family {shorten(name)!r} {'below' if above else 'at'} {what}"
            for member in family.select(self.automaton.positions[bit], what):
                below = self.tree.children[above][member]
                self._resolved[below] = self._resolved.get(below, 0) | bit << 1
        except UnknowablePositionError as error:
            self.errors.setdefault(rule, PositionError(str(error)))
        except PositionError as error:
            # A place without an order, or without that position, is passed over, and matters only
            # if the rule matches nothing. Out of range says more than no order.
            known = self.unresolved.setdefault(rule, error)
            if isinstance(error, IndexRangeError) and not isinstance(known, IndexRangeError):
                self.unresolved[rule] = error

    def _family(self, node: int, name: str | None, rule: int) -> tuple[int, Family | None]:
        """What a position counts, and the node that it stands below.

        That is the children of the node (`name` is None), else the children of its child of that
        name if they have an order, else the children called by that name and a number.

        Raises:
            PositionError: if these have no order.
        """
        children, holes = self.tree.children[node], self.tree.holes
        child = node if name is None else children.get(name)
        no_order = None
        if child is not None and child not in holes:
            try:
                return child, self._order(child)
            except PositionError as error:
                no_order = error
        family = None
        if name is not None:
            family = family_of(children, name, self._stems(node), self.tree.text(node))
        if child in holes:
            self.in_holes.add(rule)
        elif no_order and family is None:
            raise no_order
        return node, family

    def _countable(self, node: int) -> Iterable[str]:
        """The names below a node that a position may follow: of children, and of families."""
        bases = itertools.chain.from_iterable(map(base_names, self._stems(node)))
        return dict.fromkeys([*self.tree.children[node], *filter(None, bases)])

    def _order(self, node: int) -> Family:
        if node not in self._orders:
            try:
                self._orders[node] = self._find_order(node)
            except PositionError as error:
                self._orders[node] = error
        order = self._orders[node]
        if isinstance(order, PositionError):
            raise order
        return order

    def _find_order(self, node: int) -> Family:
        children = self.tree.children[node]
        if not children:
            raise PositionError(self._childless(node))
        return order_of(children, self.tree.text(node))

    def _childless(self, node: int) -> str:
        if not node:
            return "the tree is empty or a bare array, and has no children for a position to count"
        seen = f"{shorten(self.tree.text(node))!r} holds no array"
        if node in self.tree.places:
            index = self.tree.places.index(node)
            shape = ",".join(map(str, self.tree.shapes[index]))
            seen = (
                f"{shorten(self.tree.text(node))!r} is an array, {self.tree.dtypes[index]}[{shape}]"
            )
        return (
            f"{seen}, and has no children for a position to count; leave the position out for the "
            "whole array"
        )

    def _stems(self, node: int) -> dict[str, list[str]]:
        if node not in self._groups:
            self._groups[node] = stems(self.tree.children[node])
        return self._groups[node]
