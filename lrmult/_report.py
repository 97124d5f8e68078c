"""A plan as a table."""

import io
from collections.abc import Iterator
from typing import Any

from lrmult._claims import claiming_rules
from lrmult._errors import listing
from lrmult._multipliers import show_multiplier
from lrmult._parts import describe
from lrmult._paths import ParamTree
from lrmult._patterns import Span, escape, show_position
from lrmult._plan import LeafPlan, Plan
from lrmult._positions import base_names, split_number
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
    for path, leaves in _Folding(tree, answers).rows():
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
        kind = f"{_dtype(record.dtype)}[{','.join(map(str, record.shape))}]"
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


class _Folding:
    """Groups of arrays with one answer: whole subtrees, and numbered siblings that are alike."""

    def __init__(self, tree: ParamTree, answers: dict[int, tuple[str, str]]) -> None:
        self.tree = tree
        self._below: list[list[int]] = [[] for _ in tree.names]  # per node, the arrays below it
        # Per node, what all of them get; () if there are several answers.
        self._answer: list[tuple[str, ...]] = [()] * len(tree.names)
        self._kind = [0] * len(tree.names)  # per node, a number shared by those with the same rows
        kinds: dict[Any, int] = {}
        for index, node in tree.arrays():
            self._below[node] = [index]
            self._answer[node] = answers[index]
        for node in reversed(tree.nodes):
            children = self._children(node)
            if children:
                self._below[node] = [i for child in children.values() for i in self._below[child]]
                got = {self._answer[child] for child in children.values()}
                self._answer[node] = got.pop() if len(got) == 1 else ()
            inside = tuple((name, self._kind[child]) for name, child in children.items())
            self._kind[node] = kinds.setdefault((self._answer[node] or inside), len(kinds))

    def rows(self) -> Iterator[tuple[str, list[int]]]:
        """For each group its path, as a rule would say it, and its arrays."""
        stack = [([0], "")]  # groups of nodes with the same rows, and the path that stands for all
        while stack:
            nodes, path = stack.pop()
            if self._answer[nodes[0]]:
                yield path or "**", [leaf for node in nodes for leaf in self._below[node]]
                continue
            inside = []
            for names in self._alike(nodes[0]):
                members = [self.tree.children[node][name] for node in nodes for name in names]
                inside.append((members, _join(path, names)))
            stack.extend(reversed(inside))

    def _children(self, node: int) -> dict[str, int]:
        children = self.tree.children[node]
        return {name: child for name, child in children.items() if self._below[child]}

    def _alike(self, node: int) -> Iterator[list[str]]:
        """The names of the children, those of numbered neighbours with the same rows together."""
        children = self._children(node)
        numbered = {name: split_number(name) or (name, -1) for name in children}
        stems: dict[str, int] = {}
        for stem, _ in numbered.values():
            stems.setdefault(stem, len(stems))
        run: list[str] = []
        for name in sorted(children, key=lambda n: (stems[numbered[n][0]], numbered[n][1])):
            stem, number = numbered[name]
            joins = run and numbered[run[-1]] == (stem, number - 1) and number > 0
            if joins and self._kind[children[run[-1]]] == self._kind[children[name]]:
                run.append(name)
                continue
            if run:
                yield run
            run = [name]
        if run:
            yield run


def _join(above: str, names: list[str]) -> str:
    """How a rule would write some children: one by its name, several as a slice."""
    first, last = split_number(names[0]), split_number(names[-1])
    if len(names) == 1 or first is None or last is None:
        return f"{above}/{escape(names[0])}" if above else escape(names[0])
    span = show_position(Span(first[1], last[1] + 1, None))
    family = base_names(first[0])[-1]
    if not family:
        return above + span
    return f"{above}/{escape(family)}{span}" if above else escape(family) + span
