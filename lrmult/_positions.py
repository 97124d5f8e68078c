"""The natural order of children, and which of them a position means.

Children keyed by ints, or named with one stem and a number, have an order that does not depend on
how a dict was sorted: that of their numbers. A position *is* the number.
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Sequence

from lrmult._errors import IndexRangeError, PositionError, listing, shorten
from lrmult._patterns import Position, Span, show_position

_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>[0-9]{1,18})", re.DOTALL)


class UnknowablePositionError(PositionError):
    """What stands at the position cannot be known; skipping it would be a guess."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Siblings in the order of their numbers."""

    members: dict[int, str]  # number -> segment

    @functools.cached_property
    def _has_gaps(self) -> bool:
        return max(self.members) - min(self.members) >= len(self.members) or min(self.members) > 1

    @functools.cached_property
    def _last(self) -> int:
        return max(self.members)

    def in_order(self) -> list[str]:
        """All members."""
        return [self.members[number] for number in sorted(self.members)]

    def select(self, position: Position, what: str) -> list[str]:
        """The members at a position.

        Raises:
            IndexRangeError: where nothing stands there.
            UnknowablePositionError: where it counts from an end that missing numbers hide.
        """
        if self._has_gaps and _counts_from_the_end(position):
            raise UnknowablePositionError(
                f"{show_position(position)} reaches for the end of {what}, whose numbers have gaps "
                f"({self._numbers()}): what stood there cannot be known; write the number itself, "
                "a slice with an end, or pass structure=, which tells what stands in the gaps"
            )
        if isinstance(position, Span):
            wanted = range(self._last + 1)[slice(*position)]
            found = [name for number, name in sorted(self.members.items()) if number in wanted]
        else:
            number = position if position >= 0 else self._last + 1 + position
            found = [self.members[number]] if number in self.members else []
        if not found:
            if isinstance(position, Span):
                seen = f"{show_position(position)} selects nothing"
            elif 0 <= position <= self._last:
                seen = f"nothing has the number {position}"
            else:
                seen = f"{show_position(position)} is out of range"
            raise IndexRangeError(
                f"{seen}: {what} has {len(self.members)} member{'s' * (len(self.members) > 1)}, "
                f"numbered {self._numbers()}"
            )
        return found

    def _numbers(self) -> str:
        numbers = sorted(self.members)
        if numbers[-1] - numbers[0] < len(numbers):
            return f"from {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        shown = ", ".join(map(str, numbers[:8]))
        return f"{shown}, ... {numbers[-1]}" if len(numbers) > 8 else shown


def _counts_from_the_end(position: Position) -> bool:
    if not isinstance(position, Span):
        return position < 0
    start, stop, step = position
    step = 1 if step is None else step
    if stop is None and ((step == 1 and not start) or (step == -1 and start is None)):
        return False  # all of them, wherever the end is
    open_end = stop is None if step > 0 else start is None
    return open_end or (start or 0) < 0 or (stop or 0) < 0


@functools.lru_cache(maxsize=65536)
def split_number(name: str) -> tuple[str, int] | None:
    """Split ``"Dense_10"`` into ``("Dense_", 10)``; None if it ends in no number."""
    found = _NUMBERED.fullmatch(name)
    return (found["stem"], int(found["number"])) if found else None


def stems(names: Iterable[str]) -> dict[str, list[str]]:
    """Group numbered names by what stands before the number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        split = split_number(name)
        if split:
            groups.setdefault(split[0], []).append(name)
    return groups


def base_names(stem: str) -> tuple[str, ...]:
    """What a family may be called in ``name[i]``: ``Dense_0`` is of ``Dense`` and of ``Dense_``."""
    return (stem, stem[:-1]) if stem.endswith("_") else (stem,)


def family_of(
    children: Collection[str], base: str, groups: dict[str, list[str]], node: str
) -> Family | None:
    """The children named `base` and a number, in order; None if there are none.

    Raises:
        PositionError: if two of them claim one number.
    """
    plain, underscored = groups.get(base, []), groups.get(base + "_", [])
    if plain and underscored:
        raise PositionError(
            f"{shorten(base)!r} {_below(node)} may mean {listing(plain[:1])} or "
            f"{listing(underscored[:1])}; write the names of those that you mean"
        )
    names = plain or underscored
    if not names or not base:
        return None
    # Haiku calls the first of a family by the bare name: linear, linear_1, linear_2.
    bare = base in children and not plain
    return _number(names, base if bare else None, f"the family {shorten(base)!r} {_below(node)}")


def natural_order(children: Collection[str], node: str) -> Family | None:
    """All children in the order of their numbers; None if they are not of one family.

    Raises:
        PositionError: if two of them have one number.
    """
    groups = stems(children)
    unnumbered = set(children) - {name for names in groups.values() for name in names}
    if len(groups) == 1 and len(unnumbered) <= 1:
        [(stem, names)] = groups.items()
        bare = next(iter(unnumbered), None)
        if bare is None or bare + "_" == stem:
            family = _number(names, bare, f"what is {_below(node)}")
            if len(family.members) == len(children):
                return family
    return None


def order_of(
    children: Collection[str], given: Sequence[str] | None, node: str, remedy: str | None
) -> Family:
    """All children in order: that of their numbers, else the one that is given.

    Args:
        children: the names in the tree.
        given: the order that a structure gives, in which layers without parameters count.
        node: the path above them.
        remedy: what to do where they have none, other than to write their names.

    Raises:
        PositionError: if they have none.
    """
    family = natural_order(given or children, node)
    if family is not None:
        return family
    if given:
        return Family(dict(enumerate(given)))
    shown = listing([shorten(name, 40) for name in sorted(children)], 4)
    if len(children) == 1:
        raise PositionError(
            f"the only child {_below(node)}, {shown}, has no number for a position to count; write "
            "its name, or count what is below it"
        )
    raise PositionError(
        f"the children {_below(node)} ({shown}) have unlike names, and a parameter tree's "
        "structure keeps no order for them (JAX sorts dict keys); write the names of those that "
        "you mean" + (f", or {remedy}" if remedy else "")
    )


def _number(names: list[str], bare: str | None, what: str) -> Family:
    members: dict[int, str] = {}
    for name in names:
        number = (split_number(name) or ("", 0))[1]
        if number in members:
            raise PositionError(
                f"{what} has two members with the number {number}: {members[number]!r} and "
                f"{name!r}; write the names of those that you mean"
            )
        members[number] = name
    if bare is not None:
        members.setdefault(0, bare)
    return Family(members)


def _below(node: str) -> str:
    return f"below {shorten(node)!r}" if node else "at the root"
