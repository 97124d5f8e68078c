"""The states of optimizers, read by path: what in them is for which parameter."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from lrmult._errors import RuleError, listing, show
from lrmult._levels import PyTree, entries
from lrmult._paths import is_array
from lrmult._plan import cached_plan
from lrmult._rules import Rules
from lrmult._view import View

Path: TypeAlias = tuple[str, ...]


def expected_state(optimizer: Any, view: View, params: PyTree) -> PyTree:
    """What a state of an optimizer for a view looks like; None where that cannot be told.

    Shapes are enough, so that nothing is computed, unless ``init`` looks at values.
    """
    for make in (jax.eval_shape, lambda function: function()):
        try:
            return make(lambda: optimizer.init(view.narrow(params)))
        except Exception:
            continue
    return None


def owners(optimizer: Any, params: PyTree) -> dict[Path, int]:
    """Which array of the parameters what stands at a path of a state is for.

    What is not for one array, such as a counter, is left out.

    Args:
        optimizer: the optimizer.
        params: the parameters.
    """
    whole = View(cached_plan(Rules(), params, None, True), False, {})
    state = expected_state(optimizer, whole, params)
    arrays = [path for path, entry in entries(params).items() if is_array(entry)]
    numbers = {path: number for number, path in enumerate(arrays)}
    treedef: Any = jax.tree.structure(whole.narrow(params))

    def label(copy: PyTree) -> PyTree:
        """The number of its array in place of each leaf of a copy of the parameters."""
        found = []
        for path, entry in entries(copy).items():
            if is_array(entry):
                starts = (path[:depth] for depth in range(len(path) + 1))
                found.append(next((numbers[each] for each in starts if each in numbers), -1))
        return jax.tree.unflatten(jax.tree.structure(copy), found)

    def is_copy(node: PyTree) -> bool:
        if bool(treedef != jax.tree.structure(node)):
            return False
        # Of one array alone every leaf might be a copy.
        return arrays != [()] or np.shape(node)[-1:] == np.shape(params)[-1:] != ()

    try:
        # optax finds the copies by what `init` makes of a placeholder, if that is possible.
        labelled = optax.tree.map_params(
            optimizer, label, state, transform_non_params=lambda _: -1, is_leaf=lambda _: True
        )
    except Exception:
        labelled = jax.tree.map(
            lambda node: label(node) if is_copy(node) else -1, state, is_leaf=is_copy
        )
    found = {path: entry for path, entry in entries(labelled).items() if type(entry) is int}
    return {path: number for path, number in found.items() if number >= 0}


def check_state(
    optimizer: Any, view: View, params: PyTree, state: Mapping[Path, Any], remedy: str
) -> None:
    """See that a state was made for what trains.

    Args:
        optimizer: the optimizer that it is said to be of.
        view: what trains.
        params: the parameters.
        state: the entries of the state.
        remedy: what the message says to do.

    Raises:
        RuleError: if it holds something for other arrays, or for other parts of them.
    """
    expected = expected_state(optimizer, view, params)
    if expected is None:
        return
    wanted = entries(expected)
    if _shapes(wanted) == _shapes(state):
        return
    lacking: dict[int, None] = {}
    needless: dict[int, None] = {}
    unlike: dict[int, tuple[Any, Any]] = {}
    for path, array in owners(optimizer, params).items():
        want: Any = wanted.get(path)
        have: Any = state.get(path)
        if is_array(want) and not is_array(have):
            lacking[array] = None
        elif is_array(have) and not is_array(want):
            needless[array] = None
        elif is_array(want) and want.shape != np.shape(have):
            unlike.setdefault(array, (want, have))
    names = [leaf.path for leaf in view.plan.leaves]
    seen = []
    if lacking:
        seen.append(f"it holds nothing for {_named(names, lacking)}, which these rules train")
    if needless:
        seen.append(f"it holds something for {_named(names, needless)}, which these rules freeze")
    if unlike:
        want, have = next(iter(unlike.values()))
        seen.append(
            f"it holds {show(have)} for {_named(names, unlike)}, of which these rules train "
            f"{show(want)}"
        )
    if seen:
        raise RuleError(
            "this state was made for other rules, or another optimizer: "
            f"{'; '.join(seen)}; {remedy}"
        )


def explain_failure(
    optimizer: Any, view: View, params: PyTree, updates: PyTree, state: Mapping[Path, Any]
) -> str | None:
    """Why an optimizer may have failed: what it was given is not for one tree of parameters.

    Args:
        optimizer: the optimizer.
        view: what trains of the parameters.
        params: the parameters.
        updates: the updates.
        state: the entries of the state.
    """
    have, want = (_shapes(entries(tree)) for tree in (updates, params))
    unlike = [path for path in {**want, **have} if have.get(path) != want.get(path)]
    if unlike:
        return (
            "the updates are not structured like the parameters: they differ at "
            f"{listing(map('/'.join, unlike))}; pass the gradients with respect to these parameters"
        )
    expected = expected_state(optimizer, view, params)
    if expected is None:
        return None
    kept, wanted = _kinds(state), _kinds(entries(expected))
    others = [path for path in {**wanted, **kept} if wanted.get(path) != kept.get(path)]
    if not others:
        return None
    return (
        "the state was made for other parameters: it differs from one for these at "
        f"{listing(map('/'.join, others))}; call init anew, or keep the structure of the parameters"
    )


def _shapes(state: Mapping[Path, Any]) -> dict[Path, tuple[int, ...]]:
    return {path: np.shape(entry) for path, entry in state.items() if is_array(entry)}


def _kinds(state: Mapping[Path, Any]) -> dict[Path, Any]:
    """The shapes of arrays, and the classes of all else, such as what stands for frozen arrays."""
    return {path: type(entry) for path, entry in state.items()} | _shapes(state)


def _named(names: Sequence[str], arrays: Iterable[int]) -> str:
    return listing([names[array] for array in sorted(arrays)])
