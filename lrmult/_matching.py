"""Which rules match which arrays: all rules at once, in one walk over the tree.

The steps of all patterns are states of one nondeterministic automaton, and a set of states is the
bits of one Python int (the Shift-And method of Baeza-Yates and Gonnet, 1992). Moving down by one
segment costs a few operations on such ints, whatever the number of rules.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lrmult._errors import IndexRangeError, LrmultError, PositionError, RuleError
from lrmult._paths import ParamTree
from lrmult._patterns import ANY_DEPTH, At, Glob, Indexed, Names, Pattern
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
    for rule, selector in enumerate(selectors):
        if isinstance(selector, Pattern):
            continue
        if tree.holes:  # whether it would match what is not there cannot be asked
            walk.in_holes.add(rule)
        try:
            for index, node in tree.arrays():
                if _selects(selector, tree, index, node):
                    walk.matched[node] |= automaton.accepting[rule]
        except RuleError as error:
            walk.errors[rule] = error
    for node in tree.holes:
        walk.in_holes.update(automaton.rules_of(walk.active[node] | walk.matched[node]))
    rows = {bits: tuple(automaton.rules_of(bits)) for bits in set(walk.matched)}
    return Matches(
        rows=[() if node is None else rows[walk.matched[node]] for node in tree.places],
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


def _selects(selector: Any, tree: ParamTree, index: int, node: int) -> bool:
    if isinstance(selector, re.Pattern):
        return selector.fullmatch(tree.raw_text(node)) is not None
    path = tree.texts[node]
    leaf = jax.ShapeDtypeStruct(tree.shapes[index], tree.dtypes[index])
    try:
        answer = selector(path, leaf)
    except Exception as error:
        raise RuleError(
            f"its predicate raised {type(error).__name__} for the array {path!r}: {error}; a "
            "predicate takes (path: str, leaf: jax.ShapeDtypeStruct) and returns a bool"
        ) from error
    if isinstance(answer, bool | np.bool_):
        return bool(answer)
    raise RuleError(
        f"its predicate returned {answer!r} for the array {path!r}; return True or False"
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
        self.positional = 0
        self.steps: dict[int, Indexed | At] = {}  # the positional ones, by the bit of their state
        self._owner: list[int] = []  # state -> rule
        self.accepting: list[int] = []  # rule -> the bit of the state in which it has matched
        self._literals: dict[str, int] = {}
        self._globs = _GlobIndex()
        self._moves: dict[str, int] = {}
        for rule, selector in enumerate(selectors):
            steps = selector.steps if isinstance(selector, Pattern) else ()
            self.start |= (1 << len(self._owner)) if isinstance(selector, Pattern) else 0
            for step in steps:
                self._add(step, 1 << len(self._owner))
                self._owner.append(rule)
            self.accepting.append(1 << len(self._owner))
            self.accept |= self.accepting[-1]
            self._owner.append(rule)

    def _add(self, step: Any, bit: int) -> None:
        if step is ANY_DEPTH:
            self.any_depth |= bit
        elif isinstance(step, Names):
            for name in step.literals:
                self._literals[name] = self._literals.get(name, 0) | bit
            for glob in step.globs:
                self._globs.add(glob, bit)
        else:
            self.positional |= bit
            self.steps[bit] = step

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

    def move(self, states: int, name: str) -> int:
        """The states after a segment of that name; positions are not followed."""
        expecting = self._moves.get(name)
        if expecting is None:
            expecting = self._literals.get(name, 0) | self._globs.matching(name)
            self._moves[name] = expecting
        return self.close(states & self.any_depth | (states & expecting) << 1)


class _GlobIndex:
    """Globs by the fixed text that they begin or end with, so that a name meets few of them."""

    def __init__(self) -> None:
        self._by_prefix: dict[int, dict[str, list[tuple[Glob, int]]]] = {}
        self._by_suffix: dict[int, dict[str, list[tuple[Glob, int]]]] = {}

    def add(self, glob: Glob, bit: int) -> None:
        prefix, suffix = glob.parts[0], glob.parts[-1]
        index, fixed = (
            (self._by_prefix, prefix) if prefix or not suffix else (self._by_suffix, suffix)
        )
        index.setdefault(len(fixed), {}).setdefault(fixed, []).append((glob, bit))

    def matching(self, name: str) -> int:
        """The bits of the globs that match a name."""
        found = 0
        for length, globs in self._by_prefix.items():
            for glob, bit in globs.get(name[:length], ()):
                found |= bit if glob.match(name) else 0
        for length, globs in self._by_suffix.items():
            for glob, bit in globs.get(name[-length:], ()):
                found |= bit if glob.match(name) else 0
        return found


class _Walk:
    """One run of the automaton over a tree, from the root downwards."""

    def __init__(self, automaton: _Automaton, tree: ParamTree) -> None:
        self.automaton = automaton
        self.tree = tree
        self.active = [0] * len(tree.names)  # per node, the states that wait there
        self.matched = [0] * len(tree.names)  # per node, the accepting states at it or above
        self.in_holes: set[int] = set()
        self.unresolved: dict[int, PositionError] = {}
        self.errors: dict[int, LrmultError] = {}
        self._resolved: dict[int, int] = {}  # node -> the states that a position leads to there
        self._orders: dict[int, Family] = {}
        self._groups: dict[int, dict[str, list[str]]] = {}

    def run(self) -> None:
        automaton, tree = self.automaton, self.tree
        move, accept, positional = automaton.move, automaton.accept, automaton.positional
        active, matched, resolved = self.active, self.matched, self._resolved
        names, parents = tree.names, tree.parents
        for node in range(len(names)):
            if node:
                above = parents[node]
                states = move(active[above], names[node])
                if resolved:
                    states |= automaton.close(resolved.get(node, 0))
                matched[node] = matched[above] | states & accept
            else:
                states = automaton.close(automaton.start)
                matched[node] = states & accept
            active[node] = states & ~accept
            if states & positional:
                for bit in _bits(states & positional):
                    self._follow(node, bit)

    def _follow(self, node: int, bit: int) -> None:
        """Follow one position from a node to the nodes that it means."""
        [rule] = self.automaton.rules_of(bit)
        step = self.automaton.steps[bit]
        for name in [None] if isinstance(step, At) else self._candidates(node, step.names):
            try:
                above, family = self._family(node, name, rule)
                if family:
                    what = repr(self.tree.texts[above]) if above else "the root"
                    if name is not None and above == node:
                        what = f"the family {name!r} {'below' if above else 'at'} {what}"
                    for member in family.select(step.position, what):
                        below = self.tree.children[above][member]
                        self._resolved[below] = self._resolved.get(below, 0) | bit << 1
            except UnknowablePositionError as error:
                self.errors.setdefault(rule, error)
            except PositionError as error:
                # A place without an order, or without that position, is passed over, and matters
                # only if the rule matches nothing. Out of range says more than no order.
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
        family = (
            None
            if name is None
            else family_of(children, name, self._stems(node), self.tree.texts[node])
        )
        if child in holes:
            self.in_holes.add(rule)
        elif no_order and family is None:
            raise no_order
        return node, family

    def _candidates(self, node: int, names: Names) -> Iterator[str]:
        """The names below a node, of children and of families, that a step speaks of."""
        children, families = self.tree.children[node], self._stems(node)
        if not any(names.globs):
            known = (name for name in names.literals)
            yield from (n for n in known if n in children or n in families or n + "_" in families)
            return
        called = dict.fromkeys(children)
        for stem in families:
            called.update(dict.fromkeys(filter(None, base_names(stem))))
        yield from filter(names.match, called)

    def _order(self, node: int) -> Family:
        family = self._orders.get(node)
        if family is None:
            children, text = self.tree.children[node], self.tree.texts[node]
            if not children:
                seen = f"{text!r} is an array" if node else "the tree is empty or a bare array"
                raise PositionError(f"{seen}, and has no children for a position to count")
            family = self._orders[node] = order_of(children, text)
        return family

    def _stems(self, node: int) -> dict[str, list[str]]:
        if node not in self._groups:
            self._groups[node] = stems(self.tree.children[node])
        return self._groups[node]
