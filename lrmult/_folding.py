"""Which arrays share a row of a table, and the pattern that selects them."""

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Final, NamedTuple, TypeAlias

from lrmult._errors import PositionError
from lrmult._orders import Orders
from lrmult._paths import ParamTree
from lrmult._patterns import (
    ANY_DEPTH,
    At,
    Indexed,
    Names,
    Pattern,
    Span,
    Step,
    literal,
    show_pattern,
)
from lrmult._positions import base_names, split_number, stems

Answer: TypeAlias = tuple[str, str]  # a multiplier and the rules, as they are shown


class _Detail(NamedTuple):
    """How much a table tells apart."""

    most: int  # rows, for less detail not to be tried
    row_by_row: bool = True  # fold rows of siblings, unlike ones too; else numbered ones as wholes
    by_name: bool = False  # fold arrays of one name, however deep they lie
    braces: int = 60  # characters in braces


# From much to little. Long lists in braces are a last resort, for tables that fill no one screen.
_DETAILS: Final = (
    _Detail(40, row_by_row=False),
    _Detail(40),
    _Detail(70, by_name=True),
    _Detail(70, by_name=True, braces=240),
)
_FEW_ROWS: Final = 5
_MOST_NAMES: Final = 8

_Where: TypeAlias = tuple[Step, ...]  # a way down from a node; each step but `**` is one level
_Rows: TypeAlias = dict[tuple[_Where, Answer], list[int]]
_Named: TypeAlias = dict[str, tuple[Answer, list[int]]]
_EVERY: Final = Names((("", ""),))


def fold(tree: ParamTree, answers: dict[int, Answer]) -> list[tuple[str, list[int]]]:
    """Groups of arrays with one answer, each with a pattern that selects these and no others.

    They are folded no further than it takes to have few, or nearly as few as can be.
    """
    folding = _Folding(tree, answers)
    tried = []
    for detail in _DETAILS:
        tried.append(folding.rows(detail))
        if len(tried[-1]) <= detail.most:
            break
    enough = min(map(len, tried)) + _FEW_ROWS
    rows = next(rows for rows in tried if len(rows) <= enough)
    place = {leaf: place for place, leaf in enumerate(folding.in_order())}
    firsts = {min(place[leaf] for leaf in leaves): row for row, leaves in rows.items()}
    return [(_text(firsts[first][0]), rows[firsts[first]]) for first in sorted(firsts)]


class _Folding:
    """The rows of a tree, made from the leaves up, by patterns that start at the node at hand."""

    def __init__(self, tree: ParamTree, answers: dict[int, Answer]) -> None:
        self._tree = tree
        self._answers = answers
        self._orders = Orders(tree)
        self._inner_names = {tree.names[node] for node in tree.nodes if tree.children[node]}
        aliases = {alias for nodes in tree.aliases.values() for alias in nodes}
        self._above_aliases = {node for alias in aliases for node in tree.line(alias)}
        self._arrays: list[list[int]] = [[] for _ in tree.nodes]  # per node, those below it
        self._whole: dict[int, _Rows] = {}  # the nodes that are one row
        self._mixed: list[int] = []  # the others that hold arrays, from the leaves up
        self._names_told: dict[int, _Named | None] = {}
        for leaf, node in tree.arrays():
            self._arrays[node] = [leaf]
            self._whole[node] = {((), answers[leaf]): [leaf]}
        self._look_below()

    def _look_below(self) -> None:
        children, split = self._tree.children, _split_by_aliases(self._tree)
        got: dict[int, Answer | None] = {
            node: next(iter(row))[1] for node, row in self._whole.items()
        }
        for node in reversed(self._tree.nodes):
            below = [child for child in children[node].values() if child in got]
            if below:
                self._arrays[node] = [leaf for child in below for leaf in self._arrays[child]]
                [answer, *others] = {got[child] for child in below}
                got[node] = None if others else answer
                if others or answer is None or node in split:
                    self._mixed.append(node)
                else:
                    self._whole[node] = {((), answer): self._arrays[node]}

    def rows(self, detail: _Detail) -> _Rows:
        """The rows of the whole tree."""
        if detail.by_name and 0 in self._mixed and (named := self._told_by_name(0)):
            found: _Rows = {}
            for block in _blocks({"": named}):
                names, leaves = block.below([""])
                found[self._tail({0}, names, leaves), block.answer] = leaves
            return found
        rows = dict(self._whole)
        for node in self._mixed:
            if not (detail.by_name and self._told_by_name(node)):
                rows[node] = self._merged(node, rows, detail)
        return rows.get(0, {})

    def in_order(self) -> Iterator[int]:
        """The arrays, as numbers in names order them."""
        pending = [0]
        while pending:
            node = pending.pop()
            children = self._tree.children[node]
            if children:
                pending.extend(children[name] for name in reversed(in_natural_order(children)))
            else:
                yield from self._arrays[node]

    def _merged(self, node: int, rows: dict[int, _Rows], detail: _Detail) -> _Rows:
        """The rows of some children, those of siblings that say the same as one."""
        children = self._tree.children[node]
        held = [name for name in in_natural_order(children) if self._arrays[children[name]]]
        named = {name: self._told_by_name(children[name]) for name in held if detail.by_name}
        merged: _Rows = {}
        alike: dict[frozenset[tuple[_Where, Answer]], list[str]] = {}
        for name in held:
            said = list(rows[children[name]]) if named.get(name) is None else []
            for each in [[row] for row in said] if detail.row_by_row else [said]:
                alike.setdefault(frozenset(each), []).append(name)
        for block in _blocks(named):
            if block.is_whole:
                alike.setdefault(frozenset([((), block.answer)]), []).extend(block.members)
            else:
                merged |= self._rows_of(block, node, named, detail)
        siblings = self._siblings(node)
        for key, names in alike.items():
            for step, chosen in siblings.select(names, detail):
                for where, answer in key:
                    leaves = [i for name in chosen for i in rows[children[name]][where, answer]]
                    merged[(step, *where), answer] = leaves
        return merged

    def _rows_of(
        self, block: "_Block", node: int, named: dict[str, _Named | None], detail: _Detail
    ) -> _Rows:
        """The rows of a block of children of a node."""
        children = self._tree.children[node]
        members, free = list(block.members), set()
        if len(members) > 1:  # a pattern may mean siblings too that hold nothing of these names
            free = {
                name
                for name, child in children.items()
                if not self._tree.children[child] or block.passes_over(named.get(name))
            }
        rows: _Rows = {}
        for step, chosen in self._siblings(node, free).select(members, detail):
            names, leaves = block.below(chosen)
            tail = self._tail({children[name] for name in chosen}, names, leaves)
            rows[(step, *tail), block.answer] = leaves
        return rows

    def _tail(self, nodes: set[int], names: Iterable[str], leaves: list[int]) -> _Where:
        """The way from some nodes to the arrays of some names below them."""
        named = Names(tuple([(name,) for name in names]))
        above = {self._tree.parents[self._tree.places[leaf] or 0] for leaf in leaves}
        return (named,) if above <= nodes else (ANY_DEPTH, named)

    def _siblings(self, node: int, without: Collection[str] = ()) -> "_Siblings":
        """The children of a node that lead to arrays, but some."""
        children, aliases = self._tree.children[node], self._above_aliases
        names = [n for n, child in children.items() if self._arrays[child] or child in aliases]
        return _Siblings(self._orders, node, children, [n for n in names if n not in without])

    def _told_by_name(self, node: int) -> _Named | None:
        """The arrays below a node by name, if few names tell what they get; else None."""
        if node not in self._names_told:
            self._names_told[node] = self._find_names(node)
        return self._names_told[node]

    def _find_names(self, node: int) -> _Named | None:
        tree = self._tree
        if node in self._above_aliases or not tree.children[node]:
            return None
        named: _Named = {}
        for leaf in self._arrays[node]:
            name, answer = tree.names[tree.places[leaf] or 0], self._answers[leaf]
            if name not in named:
                named[name] = answer, []
                if name.isdigit() or name in self._inner_names or len(named) > _MOST_NAMES:
                    return None
            if named[name][0] != answer:
                return None
            named[name][1].append(leaf)
        return named


class _Block:
    """Siblings such that all arrays of some names below them get one answer."""

    def __init__(self, answer: Answer, members: dict[str, _Named], name: str) -> None:
        self.answer = answer
        self.members = members
        self.names = {name}

    def takes_in(self, other: "_Block") -> bool:
        """Take in another block of the same answer, if both together are one."""
        members, names = self.members | other.members, self.names | other.names
        if any(
            name in below and below[name][0] != self.answer
            for below in members.values()
            for name in names
        ):
            return False
        self.members, self.names = members, names
        return True

    def passes_over(self, below: _Named | None) -> bool:
        """Whether there is nothing of these names below a sibling, as far as that is known."""
        return below is not None and self.names.isdisjoint(below)

    @property
    def is_whole(self) -> bool:
        """Whether there are no arrays of other names below them."""
        return all(below.keys() <= self.names for below in self.members.values())

    def below(self, chosen: list[str]) -> tuple[list[str], list[int]]:
        """The names among these that arrays below some members have, and the arrays."""
        found = [
            (name, leaves)
            for sibling in chosen
            for name, (_, leaves) in self.members[sibling].items()
            if name in self.names
        ]
        return [*dict(found)], [leaf for _, leaves in found for leaf in leaves]


def _blocks(named: dict[str, _Named | None]) -> list[_Block]:
    """Few blocks that make up what is below some siblings.

    Args:
        named: the siblings, and what the arrays of each name below them get, if the name tells it.
    """
    cells: dict[tuple[str, Answer], dict[str, _Named]] = {}
    for sibling, below in named.items():
        for name, (answer, _) in (below or {}).items():
            cells.setdefault((name, answer), {})[sibling] = below or {}
    blocks: dict[Answer, list[_Block]] = {}
    for (name, answer), members in cells.items():
        block = _Block(answer, members, name)
        known = blocks.setdefault(answer, [])
        if not any(other.takes_in(block) for other in known):
            known.append(block)
    return [block for each in blocks.values() for block in each]


def _split_by_aliases(tree: ParamTree) -> set[int]:
    """The nodes with a path to an array that stands elsewhere: a rule on one speaks of that too."""
    places = set(tree.places)
    split: set[int] = set()
    for leaf, aliases in tree.aliases.items():
        own = tree.line(tree.places[leaf] or 0)
        for alias in aliases:
            if alias not in places:  # else it has a row of its own, and both rows mean both
                split.update(set(tree.line(alias)).difference(own))
    return split


def _text(where: _Where) -> str:
    steps: list[Step] = []
    for step in where:
        above = steps[-1] if steps else None
        if isinstance(step, At) and isinstance(above, Names) and not above.globs:
            steps[-1] = Indexed(above, step.position)
        else:
            steps.append(step)
    return show_pattern(Pattern(tuple(steps))) if steps else "**"


def in_natural_order(names: Collection[str]) -> list[str]:
    """Siblings as they are listed, but those with one stem together, by their numbers."""
    numbered = {name: split_number(name) or (name, -1) for name in names}
    stems: dict[str, int] = {}
    for stem, _ in numbered.values():
        stems.setdefault(stem, len(stems))
    return sorted(names, key=lambda name: (stems[numbered[name][0]], numbered[name][1]))


_MOST_STEPS = 12  # slices with longer steps are not looked for


class _Family:
    """Numbered siblings."""

    def __init__(self, base: str | None, numbers: dict[str, int]) -> None:
        self.numbers = numbers  # by name, in order
        self._base = base  # as in base[i]; None if a position follows the name of the node above
        self._places: dict[int, dict[str, tuple[int, int]]] = {}

    def spans(self, names: list[str]) -> list[tuple[Step | None, list[str]]]:
        """Split some of them into such as one slice means, and single ones.

        Slices with a step are used where less than half as many will do.
        """
        found = self._runs(names, 1)
        for step in range(2, _MOST_STEPS + 1) if len(found) > 2 else ():
            runs = self._runs(names, step)
            if 2 * len(runs) < len(found):
                found = runs
        return found

    def _runs(self, names: list[str], step: int) -> list[tuple[Step | None, list[str]]]:
        if step not in self._places:
            self._places[step] = self._count_off(step)
        places = self._places[step]
        # Those of one run have one remainder, and one distance to their place among the chosen.
        ordered = enumerate(sorted(names, key=places.__getitem__))
        runs = itertools.groupby(
            ordered, lambda each: (places[each[1]][0], places[each[1]][1] - each[0])
        )
        found = [[name for _, name in run] for _, run in runs]
        return [(self._slice(run, step) if len(run) > 1 else None, run) for run in found]

    def _count_off(self, step: int) -> dict[str, tuple[int, int]]:
        """For each, the remainder of its number, and its place among those with that remainder."""
        counts = [0] * step
        places = {}
        for name, number in self.numbers.items():
            rest = number % step
            places[name] = rest, counts[rest]
            counts[rest] += 1
        return places

    def _slice(self, names: list[str], step: int) -> Step:
        first, last = self.numbers[names[0]], self.numbers[names[-1]]
        span = Span(first, last + 1, step if step > 1 else None)
        return At(span) if self._base is None else Indexed(literal(self._base), span)


class _Token(NamedTuple):
    """One of the texts in braces, and the siblings that it means."""

    parts: tuple[str, ...]
    names: list[str]


class _Siblings:
    """Children of a node, and how a pattern says some of them but not the others."""

    def __init__(
        self, orders: Orders, node: int, children: dict[str, int], names: list[str]
    ) -> None:
        self._orders = orders
        self._node = node
        self._children = children
        self._names = names

    def select(self, names: list[str], detail: _Detail) -> list[tuple[Step, list[str]]]:
        """Patterns of one level that mean exactly some siblings, each with what it means."""
        if len(names) == 1:
            return [(literal(names[0]), names)]
        found: list[tuple[Step, list[str]]] = []
        single: list[str] = []
        for family, members in self._by_family(names):
            for step, run in family.spans(members) if family else [(None, members)]:
                if step is None:
                    single += run
                else:
                    found.append((step, run))
        if not detail.row_by_row:
            return found + [(literal(name), [name]) for name in single]
        found += self._in_braces(single, detail.braces)
        return [(_EVERY, names)] if len(found) > 1 and len(names) == len(self._names) else found

    def _by_family(self, names: list[str]) -> Iterable[tuple[_Family | None, list[str]]]:
        found: dict[int, tuple[_Family | None, list[str]]] = {}
        for name in names:
            family = self._families.get(name)
            found.setdefault(id(family), (family, []))[1].append(name)
        return found.values()

    @functools.cached_property
    def _families(self) -> dict[str, _Family]:
        """For each sibling that a position counts by the number in its name, its family."""
        found: dict[str, _Family] = {}
        for stem, members in stems(self._names).items():
            for base in reversed(base_names(stem)) if stem else (None,):
                family = self._family(base)
                if family and all(
                    split_number(m) == (stem, family.numbers.get(m)) for m in members
                ):
                    found |= dict.fromkeys(family.numbers, family)
                    break
        return found

    def _family(self, base: str | None) -> _Family | None:
        try:
            _, children, family = self._orders.counted(self._node, base)
        except PositionError:
            return None
        if family is None or children is not self._children:
            return None
        known = set(self._names)
        return _Family(base, {m: n for n, m in sorted(family.members.items()) if m in known})

    def _in_braces(self, names: list[str], most: int) -> list[tuple[Step, list[str]]]:
        """Patterns in braces, none longer than that many characters, that mean some siblings."""
        tokens = [_Token((name,), [name]) for name in names]
        if _width(tokens) > most:
            globs = [self._globs(names, of_ends) for of_ends in (False, True)]
            # The fewest, and of as few those that say more.
            tokens = min(tokens, *globs, key=lambda each: (len(each), -_width(each)))
        lists: list[list[_Token]] = []
        for token in tokens:
            if not lists or _width([*lists[-1], token]) > most:
                lists.append([])
            lists[-1].append(token)
        return [
            (Names(tuple(t.parts for t in ts)), [n for t in ts for n in t.names]) for ts in lists
        ]

    def _globs(self, names: list[str], of_ends: bool) -> list[_Token]:
        """Some siblings by what they begin or end with and no others do."""
        turn = slice(None, None, -1 if of_ends else 1)
        ordered = sorted(name[turn] for name in self._names)
        chosen = {name[turn] for name in names}
        tokens = []
        for wanted, run in itertools.groupby(range(len(ordered)), lambda i: ordered[i] in chosen):
            places = list(run)
            beside = (places[0] - 1, places[-1] + 1)
            others = [ordered[i] for i in beside if 0 <= i < len(ordered)]
            for start, group in _by_prefix([ordered[i] for i in places], others) if wanted else ():
                ends = ("", start[turn]) if of_ends else (start, "")
                parts = ends if len(group) > 1 else (start[turn],)
                tokens.append(_Token(parts, [name[turn] for name in group]))
        return tokens


def _width(tokens: list[_Token]) -> int:
    return sum(len("*".join(token.parts)) + 1 for token in tokens)


def _by_prefix(names: list[str], others: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Split sorted names into groups, each with a prefix that none of the others has."""
    groups: list[list[str]] = []
    prefix: str | None = None  # as short as can be, of the last group; None if there is none
    for name in names:
        if prefix is not None and name.startswith(prefix):
            groups[-1].append(name)
        else:
            least = max([len(_shared(name, other)) + 1 for other in others], default=0)
            prefix = name[:least] if least <= len(name) else None
            groups.append([name])
    for group in groups:
        yield _shared(group[0], group[-1]), group


def _shared(name: str, other: str) -> str:
    """What two names begin with."""
    pairs = zip(name, other, strict=False)
    return name[: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]
