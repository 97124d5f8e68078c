"""The states of optimizers, read by path: what in them is for which parameter."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from optax import MaskedNode

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
    """Which array of the parameters each array of a state is for; the others are left out.

    A state holds copies of the parameter tree, with something else in place of each array. A node
    is such a copy if every path of the parameters leads somewhere from there, be it to a hole.

    Args:
        state: the entries of the state.
        leaves: the paths of the parameters.
    """
    numbers = {leaf: index for index, leaf in enumerate(leaves)}
    nodes = {path[:depth] for path in state for depth in range(len(path) + 1)}

    def leads_on(above: Path, leaf: Path) -> bool:
        holes = (above + leaf[:depth] for depth in range(1, len(leaf)))
        return above + leaf in nodes or any(hole in state for hole in holes)

    @functools.cache
    def is_copy(node: Path) -> bool:
        return all(leads_on(node, leaf) for leaf in leaves)

    found = {}
    for path, entry in state.items():
        depths = range(len(path) + 1) if is_array(entry) else ()
        for start, end in itertools.combinations_with_replacement(depths, 2):
            leaf = path[start:end]
            if leaf in numbers and is_copy(path[:start]):
                found[path] = numbers[leaf]
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
    for path, leaf in (owners(state, leaves) | owners(expected, leaves)).items():
        want: Any = expected.get(path)
        have: Any = state.get(path)
        is_cut = any(
            isinstance(expected.get(path[:depth]), MaskedNode) for depth in range(len(path) + 1)
        )
        if is_array(want) and not is_array(have):
            lacking[leaf] = None
        elif is_array(have) and is_cut:
            needless[leaf] = None
        elif is_array(want) and want.shape != np.shape(have):
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
