"""All patterns as one automaton.

The steps of all patterns are states of one nondeterministic automaton, and a set of states is the
bits of one Python int (the Shift-And method of Baeza-Yates and Gonnet, 1992). Moving down by one
segment costs a few operations on such ints, whatever the number of rules.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

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
        globs = [*self._globs]
        states = [*self._globs.values()]
        for number, name in _candidates(globs, [*distinct]):
            if globs[number].match(name):
                expecting[name] = expecting.get(name, 0) | states[number]
        return expecting


_LONGEST = 4  # of the pieces of text by which names are found
_BUCKETS = 1 << 16


def _candidates(globs: Sequence[Glob], names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Globs, by number, with names that they may match, each pair once: all that do, few others.

    Of the longest fixed text of each glob, that piece is looked up which is rarest in the names.
    All pieces of one length are found in one pass over all names (as Rabin and Karp, 1987, search
    for several texts at once).
    """
    texts: dict[int, dict[int, str]] = {}  # by the length of a piece
    for number, glob in enumerate(globs):
        first, *middle, last = glob.parts
        outer = (f"\0{first}" if first else "", f"{last}\0" if last else "")
        text = max(*outer, *middle, key=len)
        if text:
            texts.setdefault(min(len(text), _LONGEST), {})[number] = text
        else:
            yield from ((number, name) for name in names)
    if not texts:
        return
    letters = _letters("\0".join(["", *names, ""]))
    ends = np.cumsum(np.fromiter(map(len, names), int, len(names)) + 1)
    for length, group in texts.items():
        hashes = _hashes(letters, length)
        counts = np.bincount(hashes, minlength=_BUCKETS)
        own = _hashes(_letters("".join(group.values())), length)
        rarity, own, at = counts[own].tolist(), own.tolist(), 0
        wanted: dict[int, list[int]] = {}
        for number, text in group.items():
            here = range(at, at + len(text) - length + 1)
            wanted.setdefault(own[min(here, key=rarity.__getitem__)], []).append(number)
            at += len(text)
        is_wanted = np.zeros(_BUCKETS, np.bool_)
        is_wanted[[*wanted]] = True
        places = np.flatnonzero(is_wanted[hashes])
        owners = np.searchsorted(ends, places, side="right")
        found = zip(hashes[places].tolist(), owners.tolist(), strict=True)
        for piece, owner in dict.fromkeys(found):
            if owner < len(names):  # the last piece may begin at the end of all
                yield from ((number, names[owner]) for number in wanted[piece])


def _letters(text: str) -> Any:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _hashes(letters: Any, length: int) -> Any:
    """A number below `_BUCKETS` for each piece of a text."""
    found = np.zeros(max(len(letters) - length + 1, 0), np.uint32)
    for first in range(length):
        found = found * 0x9E3779B1 + letters[first : first + len(found)]
    return found * 0x9E3779B1 >> 16
