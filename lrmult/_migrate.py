"""The state of an optimizer, carried over to other rules."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lrmult._errors import RuleError, show
from lrmult._parts import Parts
from lrmult._paths import PyTree, entries
from lrmult._plan import cached_plan
from lrmult._regions import Bools, Shape
from lrmult._rules import Rules, RulesLike
from lrmult._running import RulesState, RunTime
from lrmult._scaling import cut, put_back
from lrmult._states import Path, array_paths, check_state, is_array, owners
from lrmult._structure import Structure, read_structure
from lrmult._view import View
from lrmult._wrap import WrapState, expected_state, read_optimizer, wrap


def migrate(
    opt_state: Any,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    old_rules: RulesLike,
    new_rules: RulesLike,
    *,
    compact: bool = False,
    structure: Structure | None = None,
    strict: bool = True,
) -> Any:
    """Make a state of ``wrap(optimizer, old_rules)`` one of ``wrap(optimizer, new_rules)``.

    To thaw or freeze in mid-run without losing what the optimizer has learned:

    * what trained before and goes on training keeps its moments. The steps that follow are those of
      a run in which it had trained alone all along, for optimizers that treat elements alone (to
      the bit, but that XLA may round a product and a sum once in one compiled step and twice in
      another, where arrays are frozen in part);
    * what is thawed starts with fresh moments, and what is frozen loses them, both also within
      arrays;
    * step counters, hyperparameters and all else that is not for one array go on; so does the step
      of schedules among the multipliers, if the old rules had some. Since counters go on, Adam does
      not correct the bias of fresh moments: with its default decay the updates of what is thawed
      are three to seven times as large as they should be in the first hundred steps, and a quarter
      larger after a thousand. A schedule in the new rules can make up for that
      (``examples/gradual_unfreezing.py``);
    * statistics of rows and columns (adafactor, sm3) are kept as they are if an array goes on
      training in part, and start afresh if their size changes.

    Args:
        opt_state: the state. One that Orbax restored without a target, as plain containers, will
            do too, and so will one of the optimizer itself, for which the old rules are ``[]``.
        params: the parameters as they are now.
        optimizer: what is wrapped.
        old_rules: the rules that the state was made with.
        new_rules: the rules to come.
        compact: as for `wrap`.
        structure: as for `compile_rules`.
        strict: as for `compile_rules`.

    Returns:
        A state of ``wrap(optimizer, new_rules)``, with ``compact``, ``structure`` and ``strict`` as
        given.

    Raises:
        RuleError: if the state was made for other rules than the old ones, as far as that shows, or
            by another optimizer; if it keeps arrays whose parts cannot be told to be for one array
            (`optax.flatten`), and whose size changes.
        MaskError: if it was made for other element masks.
        LrmultError: what `compile_rules` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> import optax
        >>> params = {"trunk": jnp.ones(2), "head": jnp.ones(2)}
        >>> adam, first, then = optax.adam(0.1), [("trunk", None)], []
        >>> tx = lm.wrap(adam, first)
        >>> grads = {"trunk": jnp.ones(2), "head": jnp.ones(2)}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> state = lm.migrate(state, params, adam, first, then)
        >>> tx = lm.wrap(adam, then)
        >>> for name, moment in optax.tree.get(state, "mu").items():
        ...     print(name, moment.round(3))
        head [0.1 0.1]
        trunk [0. 0.]
    """
    structure = read_structure(structure)
    new = wrap(optimizer, new_rules, compact=compact, structure=structure, strict=strict)
    fresh = new.init(params)
    rules = Rules(old_rules), Rules(new_rules)
    views = [
        View(cached_plan(each, params, structure, strict), compact, RunTime(each).packed)
        for each in rules
    ]
    expected = expected_state(read_optimizer(optimizer), views[0], params)
    if not isinstance(opt_state, WrapState) and not (
        isinstance(opt_state, Mapping) and opt_state.keys() == set(WrapState._fields)
    ):
        opt_state = WrapState(opt_state, optax.EmptyState())
    found = entries(opt_state)
    inner = {path[1:]: entry for path, entry in found.items() if path[0] == "inner_state"}
    remedy = "pass the rules that it was made with as old_rules"
    check_state(entries(expected), inner, array_paths(params), remedy)
    carry = _Carry(params, *views)
    wanted = entries(fresh.inner_state)
    owner = owners(wanted, array_paths(params))
    leaves = []
    for path, start in wanted.items():
        if not is_array(start):
            continue
        if path in owner:
            leaves.append(carry(owner[path], inner.get(path), start))
        else:
            leaves.append(_going_on(path, inner.get(path), start))
    inner_state = jax.tree.unflatten(jax.tree.structure(fresh.inner_state), leaves)
    return WrapState(inner_state, _rules_state(found, rules[0], fresh.rules_state))


def _rules_state(found: Mapping[Path, Any], old_rules: Rules, fresh: Any) -> Any:
    """What the new rules keep; the step of schedules goes on.

    Raises:
        MaskError: if the state was made for other masks than those of the old rules.
    """
    kept = {path[1:]: entry for path, entry in found.items() if path[0] == "rules_state"}
    masks = [
        entry for path, entry in kept.items() if path[:1] == ("rules_masks",) and is_array(entry)
    ]
    RunTime(old_rules).check_masks(tuple(masks))
    step = kept.get(("rules_step",))
    if step is None or not isinstance(fresh, RulesState):
        return fresh
    return fresh._replace(rules_step=jnp.asarray(step))


def _going_on(path: Path, old: Any, fresh: Any) -> Any:
    """What is for no one array: a step counter, a hyperparameter."""
    name = "/".join(path)
    if not is_array(old):
        raise RuleError(
            f"the state has nothing at {name!r}: it was made by another optimizer; pass the one "
            "that made it"
        )
    if np.shape(old) != np.shape(fresh):
        raise RuleError(
            f"the optimizer keeps {show(old)} at {name!r}, which is {show(fresh)} under the new "
            "rules, and nothing tells which part is for which parameter; call init"
        )
    return jnp.asarray(old)


class _Carry:
    """Carries what is kept for one array over from what trained to what trains.

    Args:
        params: the parameters.
        old: what trained of them.
        new: what trains.
    """

    def __init__(self, params: PyTree, old: View, new: View) -> None:
        leaves = jax.tree.leaves(params)
        self._arrays = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
        self._shapes = [np.shape(leaf) for leaf in leaves]
        self._views = old, new
        self._frozen = [view.plan.treedef.flatten_up_to(view.plan.frozen) for view in self._views]

    def __call__(self, array: int, old: Any, fresh: Any) -> Any:
        """What the new state keeps for an array in one place.

        Args:
            array: the number of the array.
            old: what the old state keeps in that place, if anything.
            fresh: what a fresh state keeps there.
        """
        leaf = self._arrays[array]
        shape = self._shapes[leaf]
        then, now = (~_dense(frozen[leaf], shape) for frozen in self._frozen)
        both = then & now
        if not is_array(old) or not (both.any() or both.size == 0):
            return fresh
        old = jnp.asarray(old)
        if np.array_equal(then, now):
            return old
        lead = old.ndim - len(shape)  # axes of its own, such as those of the history of lbfgs
        boxes = [view.boxes[leaf] for view in self._views]
        by_element = lead >= 0 and all(
            np.shape(kept) == old.shape[:lead] + box.size(shape)
            for kept, box in zip((old, fresh), boxes, strict=True)
        )
        if not by_element:  # statistics of rows and columns
            return old if old.shape == np.shape(fresh) else fresh
        source, target = (box.below(lead) for box in boxes)
        mixed = jnp.where(both, put_back(old, source, old), put_back(fresh, target, fresh))
        return cut(mixed, target)


def _dense(frozen: Any, shape: Shape) -> Bools:
    return frozen.dense() if isinstance(frozen, Parts) else np.broadcast_to(frozen, shape)
