"""A plan as a table."""

import functools
import io
import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

from lrmult._claims import claiming_rules
from lrmult._errors import PositionError, listing, spec
from lrmult._multipliers import show_multiplier
from lrmult._orders import Orders
from lrmult._parts import describe
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
from lrmult._plan import LeafPlan, Plan
from lrmult._positions import base_names, split_number, stems
from lrmult._rules import name_rule

# numpy's name of a dtype -> the short one that jax prints
_SHORT = {"float": "f", "bfloat": "bf", "complex": "c", "uint": "u", "int": "i"}
_MOST_RULES = 3


def render(plan: Plan) -> str:
    """The table as plain text; no line is wrapped, however narrow the terminal."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=10_000, color_system=None, legacy_windows=False)
    console.print(plan, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def table(plan: Plan, tree: ParamTree) -> Any:
    """The table for rich: a row for each group of arrays that share one answer, and totals."""
    from rich.box import Box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    # Only the third line shows: what is under the heads. ASCII, since a table may go to any file.
    lines = Box("    \n" * 2 + " -- \n" + "    \n" * 5, ascii=True)
    shown = Table(box=lines, show_edge=False, pad_edge=False)
    for name in ("parameters", "arrays"):
        shown.add_column(name)
    for name in ("size", "multiplier"):
        shown.add_column(name, justify="right")
    shown.add_column("rule")
    records = dict(zip((index for index, _ in tree.arrays()), plan.leaves, strict=True))
    answers = {index: _answer(index, plan, tree) for index in records}
    for path, leaves in _fold(tree, answers):
        size = sum(records[leaf].trained + records[leaf].frozen for leaf in leaves)
        multiplier, rules = answers[leaves[0]]
        cells = (
            path if path.isprintable() else repr(path)[1:-1],
            _describe([records[leaf] for leaf in leaves]),
            f"{size:,}",
            multiplier,
            rules,
        )
        style = "dim" if multiplier == show_multiplier(None) else ""
        shown.add_row(*(Text(cell, style=style) for cell in cells))
    notes = [Text(""), Text(_totals(plan))]
    for path, alias in _aliases(tree):
        notes.append(Text(f"{path} is {alias} too"))
    claiming = claiming_rules(plan.claims)
    for index, rule in enumerate(plan.rules):
        lost = [records[leaf].path for leaf, rules in plan.overruled.items() if index in rules]
        if lost:
            notes.append(
                Text(f"{name_rule(index, *rule)} lost {listing(lost)} to a rule on another path")
            )
        elif index not in claiming:
            notes.append(Text(f"{name_rule(index, *rule)} claims nothing here"))
    return Group(shown, *notes)


def _answer(leaf: int, plan: Plan, tree: ParamTree) -> tuple[str, str]:
    """What one array gets, and the rules that say so, as the table shows it."""
    pieces = plan.claims[leaf]
    multipliers = [1.0 if p.rule is None else plan.rules[p.rule].multiplier for p in pieces]
    claiming = dict.fromkeys(p.rule for p in pieces if p.rule is not None)
    named = [f"{rule}: {plan.rules[rule].text}" for rule in claiming]
    if len(named) > _MOST_RULES:
        named[_MOST_RULES - 1 :] = [f"{len(named) - _MOST_RULES + 1} more"]
    rules = "; ".join(named)
    stacked = {axis for at in tree.slices.get(leaf, {}).values() for axis in at}
    texts = map(show_multiplier, multipliers)
    return describe(tree.shapes[leaf], pieces, texts, stacked), rules or "none"


def _aliases(tree: ParamTree) -> list[tuple[str, str]]:
    """The paths that lead to one array, or to one subtree, in pairs."""
    pairs = {
        (tree.places[leaf] or 0, alias): None
        for leaf, aliases in tree.aliases.items()
        for alias in aliases
    }
    while True:
        for node, alias in pairs:
            above, beside = tree.parents[node], tree.parents[alias]
            inside = {
                (child, tree.children[beside].get(name))
                for name, child in tree.children[above].items()
            }
            if (
                above != beside
                and inside <= pairs.keys()
                and len(inside) == len(tree.children[beside])
            ):
                pairs = {pair: None for pair in pairs if pair not in inside}
                pairs[above, beside] = None
                break
        else:
            break
    written = {}
    for node, alias in pairs:
        if (alias, node) not in written:  # both may be in the tree
            written[node, alias] = tree.text(node), tree.text(alias)
    return sorted(written.values())


def _totals(plan: Plan) -> str:
    trained = sum(record.trained for record in plan.leaves)
    frozen = sum(record.frozen for record in plan.leaves)
    arrays = len(plan.leaves)
    return (
        f"{arrays:,} array{'s' * (arrays != 1)}, {trained + frozen:,} parameters: "
        f"{trained:,} train, {frozen:,} frozen"
    )


def _describe(records: list[LeafPlan]) -> str:
    kinds: dict[str, int] = {}
    for record in records:
        kind = spec(record.shape, _dtype(record.dtype))
        kinds[kind] = kinds.get(kind, 0) + 1
    if len(kinds) > 2:
        return f"{len(records)} arrays"
    return " + ".join(f"{n} x {kind}" if n > 1 else kind for kind, n in kinds.items())


def _dtype(dtype: Any) -> str:
    name = str(dtype)
    for long, short in _SHORT.items():
        if name.startswith(long) and name[len(long) :].isdigit():
            return short + name[len(long) :]
    return name


# How far rows are folded: numbered siblings that are alike in all that they hold, then any siblings
# row by row, then arrays of one name however deep they lie.
_ALIKE, _ROW_BY_ROW, _BY_NAME = range(3)
_MOST_ROWS = 40
_FEW_ROWS = 5
_MOST_IN_BRACES = 60  # characters

_Where: TypeAlias = tuple[Step, ...]  # a way down from a node; each step but `**` is one level
_Answer: TypeAlias = tuple[str, str]
_Rows: TypeAlias = dict[tuple[_Where, _Answer], list[int]]
_Named: TypeAlias = dict[str, tuple[_Answer, list[int]]]
_EVERY: Final = Names((("", ""),))


def _fold(tree: ParamTree, answers: dict[int, _Answer]) -> list[tuple[str, list[int]]]:
    """Groups of arrays with one answer, each with a pattern that selects these and no others.

    Rows are folded no further than it takes to have few of them, or nearly as few as can be.
    """
    tried = []
    for detail in (_ALIKE, _ROW_BY_ROW, _BY_NAME):
        tried.append(_Folding(tree, answers, detail).rows())
        if len(tried[-1]) <= _MOST_ROWS:
            return tried[-1]
    enough = min(map(len, tried)) + _FEW_ROWS
    return next(rows for rows in tried if len(rows) <= enough)


class _Folding:
    """The rows of every node, made from those of its children, by patterns that start there."""

    def __init__(self, tree: ParamTree, answers: dict[int, _Answer], detail: int) -> None:
        self._tree = tree
        self._answers = answers
        self._detail = detail
        self._orders = Orders(tree)
        self._arrays: list[list[int]] = [[] for _ in tree.nodes]  # per node, those below it
        self._rows: list[_Rows] = [{} for _ in tree.nodes]
        # Per node, what all arrays below it get; None if there are several answers.
        self._answer: list[_Answer | None] = [None for _ in tree.nodes]
        # Per node, what the arrays of each name below it get; None if the name does not tell it.
        self._named: list[_Named | None] = [None for _ in tree.nodes]
        aliases = {alias for nodes in tree.aliases.values() for alias in nodes}
        self._above_aliases = {node for alias in aliases for node in tree.line(alias)}
        self._split = _split_by_aliases(tree)
        self._inner_names = {tree.names[node] for node in tree.nodes if tree.children[node]}
        for index, node in tree.arrays():
            self._arrays[node] = [index]
            self._answer[node] = answers[index]
            self._rows[node] = {((), answers[index]): [index]}
        for node in reversed(tree.nodes):
            self._enter(node)

    def rows(self) -> list[tuple[str, list[int]]]:
        """The rows of the whole tree, in its order."""
        order = {leaf: place for place, leaf in enumerate(self._in_order())}
        rows = [
            (min(order[leaf] for leaf in leaves), _text(where), leaves)
            for (where, _), leaves in self._rows[0].items()
        ]
        return [(path, leaves) for _, path, leaves in sorted(rows)]

    def _enter(self, node: int) -> None:
        """Note what is below a node, once that is known of its children."""
        children = self._tree.children[node]
        held = [name for name in in_natural_order(children) if self._arrays[children[name]]]
        if not held:
            return
        arrays = [leaf for child in children.values() for leaf in self._arrays[child]]
        self._arrays[node] = arrays
        got = {self._answer[children[name]] for name in held}
        self._answer[node] = got.pop() if len(got) == 1 else None
        self._named[node] = self._by_name(node)
        answer = self._answer[node]
        if answer and node not in self._split:
            self._rows[node] = {((), answer): arrays}
        elif node or not self._named[node]:
            self._rows[node] = self._merged(node, held)
        else:
            for block in _blocks({"": self._named[node]}):
                names, leaves = block.below([""])
                self._rows[node][self._tail({node}, names, leaves), block.answer] = leaves

    def _by_name(self, node: int) -> _Named | None:
        """The arrays below a node by their names, if these tell what they get, and are few."""
        tree = self._tree
        if self._detail < _BY_NAME or node in self._above_aliases:
            return None
        named: _Named = {}
        for leaf in self._arrays[node]:
            name, answer = tree.names[tree.places[leaf] or 0], self._answers[leaf]
            if name not in named:
                named[name] = answer, []
                width = sum(map(len, named))
                if name.isdigit() or name in self._inner_names or width > _MOST_IN_BRACES:
                    return None
            if named[name][0] != answer:
                return None
            named[name][1].append(leaf)
        return named

    def _merged(self, node: int, held: list[str]) -> _Rows:
        """The rows of some children, those of siblings that say the same as one."""
        children, rows = self._tree.children[node], self._rows
        alike: dict[frozenset[tuple[_Where, _Answer]], list[str]] = {}
        for name in held:
            if self._named[children[name]] is None:
                said = rows[children[name]]
                for key in map(frozenset, [[row] for row in said] if self._detail else [said]):
                    alike.setdefault(key, []).append(name)
        merged: _Rows = {}
        for block in _blocks({name: self._named[children[name]] for name in held}):
            if block.is_whole:
                alike.setdefault(frozenset([((), block.answer)]), []).extend(block.members)
            else:
                merged |= self._rows_of(block, node)
        siblings = self._siblings(node)
        for key, names in alike.items():
            for step, chosen in siblings.select(names, unlike=self._detail > _ALIKE):
                for where, answer in rows[children[chosen[0]]].keys() & key:
                    leaves = [i for name in chosen for i in rows[children[name]][where, answer]]
                    merged[(step, *where), answer] = leaves
        return merged

    def _rows_of(self, block: "_Block", node: int) -> _Rows:
        """The rows of a block of children of a node."""
        children = self._tree.children[node]
        # A pattern may mean siblings too that hold nothing of these names.
        free = {
            name
            for name, child in children.items()
            if not self._tree.children[child]
            or block.names.isdisjoint(self._named[child] or block.names)
        }
        rows: _Rows = {}
        siblings = self._siblings(node, free)
        for step, chosen in siblings.select(list(block.members), unlike=True):
            names, leaves = block.below(chosen)
            tail = self._tail({children[name] for name in chosen}, names, leaves)
            rows[(step, *tail), block.answer] = leaves
        return rows

    def _tail(self, nodes: set[int], names: Iterable[str], leaves: list[int]) -> _Where:
        """The way from some nodes to the arrays of some names below them."""
        named = Names(tuple((name,) for name in names))
        above = {self._tree.parents[self._tree.places[leaf] or 0] for leaf in leaves}
        return (named,) if above <= nodes else (ANY_DEPTH, named)

    def _siblings(self, node: int, without: Collection[str] = ()) -> "_Siblings":
        """The children of a node that lead to arrays, but some."""
        children, aliases = self._tree.children[node], self._above_aliases
        names = [n for n, child in children.items() if self._arrays[child] or child in aliases]
        return _Siblings(self._orders, node, children, [n for n in names if n not in without])

    def _in_order(self) -> Iterator[int]:
        """The arrays, as numbers in names order them."""
        pending = [0]
        while pending:
            node = pending.pop()
            children = self._tree.children[node]
            if not children:
                yield from self._arrays[node]
            pending.extend(children[name] for name in reversed(in_natural_order(children)))


class _Block:
    """Siblings such that all arrays of some names below them get one answer."""

    def __init__(self, answer: _Answer, members: dict[str, _Named], name: str) -> None:
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
    cells: dict[tuple[str, _Answer], dict[str, _Named]] = {}
    for sibling, below in named.items():
        for name, (answer, _) in (below or {}).items():
            cells.setdefault((name, answer), {})[sibling] = below or {}
    blocks: dict[_Answer, list[_Block]] = {}
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

    def select(self, names: list[str], *, unlike: bool) -> list[tuple[Step, list[str]]]:
        """Patterns of one level that mean exactly some siblings, each with what it means.

        Args:
            names: the siblings.
            unlike: whether siblings of unlike names may be joined too.
        """
        if len(names) == 1:
            return [(literal(names[0]), names)]
        found: list[tuple[Step, list[str]]] = []
        left: list[str] = []
        families: dict[int, tuple[_Family, list[str]]] = {}
        for name in names:
            family = self._families.get(name)
            if family is None:
                left.append(name)
            else:
                families.setdefault(id(family), (family, []))[1].append(name)
        for family, members in families.values():
            for step, run in family.spans(members):
                if step is None:
                    left += run
                else:
                    found.append((step, run))
        if not unlike:
            return found + [(literal(name), [name]) for name in left]
        found += self._in_braces(left)
        return [(_EVERY, names)] if len(found) > 1 and len(names) == len(self._names) else found

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
            above, children, family = self._orders.counted(self._node, base)
        except PositionError:
            return None
        if family is None or above != self._node or children is not self._children:
            return None
        known = set(self._names)
        return _Family(base, {m: n for n, m in sorted(family.members.items()) if m in known})

    def _in_braces(self, names: list[str]) -> list[tuple[Step, list[str]]]:
        """Patterns in braces, none of them long, that mean some siblings."""
        tokens = [_Token((name,), [name]) for name in names]
        if _width(tokens) > _MOST_IN_BRACES:
            tokens = min(tokens, self._globs(names, False), self._globs(names, True), key=_width)
        found: list[list[_Token]] = []
        for token in tokens:
            if not found or _width([*found[-1], token]) > _MOST_IN_BRACES:
                found.append([])
            found[-1].append(token)
        return [
            (
                Names(tuple(token.parts for token in each)),
                [n for token in each for n in token.names],
            )
            for each in found
        ]

    def _globs(self, names: list[str], of_ends: bool) -> list[_Token]:
        """Some siblings by what they begin or end with and no others do."""
        turn = slice(None, None, -1 if of_ends else 1)
        ordered = sorted(name[turn] for name in self._names)
        chosen = {name[turn] for name in names}
        tokens = []
        for is_chosen, run in itertools.groupby(
            range(len(ordered)), lambda i: ordered[i] in chosen
        ):
            if is_chosen:
                places = list(run)
                outside = ordered[max(places[0] - 1, 0) : places[0]] + ordered[places[-1] + 1 :][:1]
                for start, group in _by_prefix([ordered[i] for i in places], outside):
                    parts = (start[turn],) if len(group) == 1 else (start, "")
                    if of_ends and len(group) > 1:
                        parts = ("", start[turn])
                    tokens.append(_Token(parts, [name[turn] for name in group]))
        return tokens


def _width(tokens: list[_Token]) -> int:
    return sum(len("*".join(token.parts)) + 1 for token in tokens)


def _by_prefix(names: list[str], others: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Split sorted names into groups, each with a prefix that none of the others has."""
    least = 0
    groups: list[list[str]] = []
    for name in names:
        if groups and least <= len(name) and name.startswith(groups[-1][0][:least]):
            groups[-1].append(name)
        else:
            groups.append([name])
            least = max([len(_shared(name, other)) + 1 for other in others], default=0)
    for group in groups:
        yield _shared(group[0], group[-1]), group


def _shared(name: str, other: str) -> str:
    """What two names begin with."""
    pairs = zip(name, other, strict=False)
    return name[: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]
