"""All patterns as one automaton.

The steps of all patterns are states of one nondeterministic automaton, and a set of states is the
bits of one Python int (the Shift-And method of Baeza-Yates and Gonnet, 1992). Moving down by one
segment costs a few operations on such ints, whatever the number of rules.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence

from lrmult._patterns import At, Glob, Indexed, Names, Pattern, Position, Step
from lrmult._targets import Selector


def bits(states: int) -> Iterator[int]:
    """The bits of a set of states, lowest first."""
    while states:
        bit = states & -states
        yield bit
        states ^= bit


class Automaton:
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
        for bit in bits(states):
            rule = self._owner[bit.bit_length() - 1]
            if rule != last:
                yield rule
            last = rule

    def close(self, states: int) -> int:
        """Add what is reached without a segment: `**` may stand for none."""
        return states | (states & self.any_depth) << 1

    def expecting(self, names: Iterable[str]) -> dict[str, int]:
        """The states that wait for each of some names, with a position or without, if any do."""
        distinct = set(names)
        expecting = {name: self._literals[name] for name in self._literals.keys() & distinct}
        if self._globs:
            vocabulary = _Vocabulary(distinct)
            for glob, states in self._globs.items():
                for name in vocabulary.matching(glob):
                    expecting[name] = expecting.get(name, 0) | states
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
