"""The states of optimizers, read by path: what in them is for which parameter."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from lrmult._errors import RuleError, listing, show
from lrmult._paths import PyTree, entries, shape_and_dtype
from lrmult._patterns import escape

Path: TypeAlias = tuple[str, ...]


def is_array(entry: Any) -> bool:
    """Whether an entry is one, or a number; holes and empty containers are not."""
    return shape_and_dtype(entry)[1] is not None


def array_paths(params: PyTree) -> list[Path]:
    """The paths of the arrays of a parameter tree."""
    return [path for path, entry in entries(params).items() if is_array(entry)]


def owners(state: Mapping[Path, Any], leaves: Sequence[Path]) -> dict[Path, int]:
    """Which array of the parameters each entry of a state is for; the other entries are left out.

    A state holds copies of the parameter tree, with something else in place of each array. A node
    is such a copy if every path of the parameters leads somewhere from there.

    Args:
        state: the entries of the state.
        leaves: the paths of the parameters.
    """
    if not leaves:
        return {}
    nodes = {path[:depth] for path in state for depth in range(len(path) + 1)}
    first = leaves[0]
    copied: dict[Path, int] = {}
    for node in nodes:
        above = node[: len(node) - len(first)]
        if node == above + first and all(above + leaf in nodes for leaf in leaves):
            copied.update({above + leaf: index for index, leaf in enumerate(leaves)})
    found = {}
    for path in state:
        for depth in range(len(path), -1, -1):
            if path[:depth] in copied:
                found[path] = copied[path[:depth]]
                break
    return found


def check_state(
    expected: Mapping[Path, Any], state: Mapping[Path, Any], leaves: Sequence[Path], remedy: str
) -> None:
    """See that a state was made for what trains under the rules at hand.

    Args:
        expected: the entries of a state for these rules; shapes are enough.
        state: the entries of the state.
        leaves: the paths of the parameters.
        remedy: what the message says to do.

    Raises:
        RuleError: if it holds something for other arrays, or for other parts of them.
    """
    lacking: dict[int, None] = {}
    needless: dict[int, None] = {}
    unlike: dict[int, tuple[Any, Any]] = {}
    for path, leaf in owners(expected, leaves).items():
        want: Any = expected[path]
        have: Any = state.get(path)
        if is_array(want) and not is_array(have):
            lacking[leaf] = None
        elif is_array(have) and not is_array(want):
            needless[leaf] = None
        elif is_array(want) and want.shape != have.shape:
            unlike.setdefault(leaf, (want, have))
    names = ["/".join(map(escape, leaf)) for leaf in leaves]
    seen = []
    if lacking:
        seen.append(f"it holds nothing for {_named(names, lacking)}, which these rules train")
    if needless:
        seen.append(f"it holds something for {_named(names, needless)}, which these rules freeze")
    if unlike:
        leaf, (want, have) = next(iter(unlike.items()))
        seen.append(
            f"it holds {show(have)} for {_named(names, unlike)}, of which these rules train "
            f"{show(want)}"
        )
    if seen:
        raise RuleError(
            "this state was made for other rules, or another optimizer: "
            f"{'; '.join(seen)}; {remedy}"
        )


def _named(names: Sequence[str], leaves: Iterable[int]) -> str:
    return listing([names[leaf] for leaf in leaves])
