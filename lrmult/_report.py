"""A plan as a table: in a terminal, and in a notebook."""

import functools
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lrmult._claims import claiming_rules
from lrmult._errors import listing, spec
from lrmult._folding import Answer, fold
from lrmult._multipliers import show_multiplier
from lrmult._parts import describe
from lrmult._paths import ParamTree
from lrmult._plan import LeafPlan, Plan
from lrmult._rules import name_rule

# numpy's name of a dtype -> the short one that jax prints
_SHORT = {"float": "f", "bfloat": "bf", "complex": "c", "uint": "u", "int": "i"}
_MOST_RULES = 3
_COLUMNS = {
    "parameters": "left",
    "arrays": "left",
    "size": "right",
    "multiplier": "right",
    "rule": "left",
}


def render(shown: Any) -> str:
    """What rich can show as plain text; no line is wrapped, however narrow the terminal."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=10_000, color_system=None, legacy_windows=False)
    console.print(shown, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def lined(
    columns: Mapping[str, str], rows: Iterable[tuple[Sequence[str], str]], notes: Iterable[str]
) -> Any:
    """A table for rich: columns with their sides, rows of cells with a style, and lines below."""
    from rich.box import Box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    # Only the third line shows: what is under the heads. ASCII, since a table may go to any file.
    lines = Box("    \n" * 2 + " -- \n" + "    \n" * 5, ascii=True)
    shown = Table(box=lines, show_edge=False, pad_edge=False)
    for name, side in columns.items():
        shown.add_column(name, justify="right" if side == "right" else "left")
    for cells, style in rows:
        shown.add_row(*(Text(cell, style=style) for cell in cells))
    return Group(shown, Text(""), *map(Text, notes))


def table(plan: Plan) -> Any:
    """The table for rich: a row for each group of arrays that share one answer, and totals."""
    rows = ((row.cells, "dim" if row.is_frozen else "") for row in _rows(plan))
    return lined(_COLUMNS, rows, _notes(plan))


def html_table(plan: Plan) -> str:
    """The table for a notebook, in whatever colours that has."""
    heads = [
        f'<th scope="col" style="text-align:{side}">{name}</th>' for name, side in _COLUMNS.items()
    ]
    rows = []
    for row in _rows(plan):
        path, *cells = (
            f'style="text-align:{side};white-space:pre">{html.escape(cell)}'
            for cell, side in zip(row.cells, _COLUMNS.values(), strict=True)
        )
        style = ' style="opacity:0.6"' if row.is_frozen else ""
        shown = "".join(f"<td {cell}</td>" for cell in cells)
        rows.append(f'<tr{style}><th scope="row" {path}</th>{shown}</tr>')
    notes = "<br>".join(map(html.escape, _notes(plan)))
    return (
        '<div style="overflow-x:auto"><table>\n'
        f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + f"\n</tbody></table>\n<p>{notes}</p></div>"
    )


class _Row(NamedTuple):
    """Arrays that share one answer, as a table shows them."""

    cells: tuple[str, ...]  # one for each of the columns
    is_frozen: bool


def _rows(plan: Plan) -> Iterator[_Row]:
    tree = plan.tree
    records = dict(zip((index for index, _ in tree.arrays()), plan.leaves, strict=True))
    found = answers(plan)
    for path, leaves in fold(tree, found):
        size = sum(records[leaf].trained + records[leaf].frozen for leaf in leaves)
        multiplier, rules = found[leaves[0]]
        cells = (
            path if path.isprintable() else repr(path)[1:-1],
            _describe([records[leaf] for leaf in leaves]),
            f"{size:,}",
            multiplier,
            rules,
        )
        yield _Row(cells, is_frozen=multiplier == show_multiplier(None))


def _notes(plan: Plan) -> list[str]:
    """What stands below the table: totals, paths of one array, rules that do nothing."""
    notes = [totals(plan)]
    notes += [f"{path} is {alias} too" for path, alias in _aliases(plan.tree)]
    claiming = claiming_rules(plan.claims)
    for index, rule in enumerate(plan.rules):
        lost = [plan.tree.path(leaf) for leaf, rules in plan.overruled.items() if index in rules]
        if lost:
            notes.append(
                f"{name_rule(index, *rule)} lost {listing(lost)} to a rule on another path"
            )
        elif index not in claiming:
            notes.append(f"{name_rule(index, *rule)} claims nothing here")
    return notes


def answers(plan: Plan) -> dict[int, Answer]:
    """What each array gets, and the rules that say so, as the table shows it."""
    tree, found = plan.tree, {}
    known: dict[Any, Answer] = {}  # arrays that one rule has as a whole share their pieces
    for leaf, _ in tree.arrays():
        stacked = frozenset(axis for at in tree.slices.get(leaf, {}).values() for axis in at)
        key = id(plan.claims[leaf]), tree.shapes[leaf], stacked
        if key not in known:
            known[key] = _answer(plan, leaf, stacked)
        found[leaf] = known[key]
    return found


def _answer(plan: Plan, leaf: int, stacked: Iterable[int]) -> Answer:
    pieces = plan.claims[leaf]
    multipliers = [1.0 if p.rule is None else plan.rules[p.rule].multiplier for p in pieces]
    claiming = dict.fromkeys(p.rule for p in pieces if p.rule is not None)
    named = [f"{rule}: {plan.rules[rule].text}" for rule in claiming]
    if len(named) > _MOST_RULES:
        named[_MOST_RULES - 1 :] = [f"{len(named) - _MOST_RULES + 1} more"]
    texts = map(show_multiplier, multipliers)
    return describe(plan.shapes[leaf], pieces, texts, stacked), "; ".join(named) or "none"


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


def totals(plan: Plan) -> str:
    """How much there is, trains and is frozen, in a line."""
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


@functools.lru_cache
def _dtype(dtype: Any) -> str:
    name = str(dtype)
    for long, short in _SHORT.items():
        if name.startswith(long) and name[len(long) :].isdigit():
            return short + name[len(long) :]
    return name
