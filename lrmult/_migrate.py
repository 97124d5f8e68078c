"""The state of an optimizer, carried over to other rules."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lrmult._errors import RuleError, show
from lrmult._levels import PyTree, entries
from lrmult._parts import Parts
from lrmult._paths import is_array
from lrmult._plan import cached_plan, warned
from lrmult._rules import Rules, RulesLike
from lrmult._running import RulesState, RunTime
from lrmult._scaling import cut, put_back
from lrmult._states import Path, check_state, owners
from lrmult._structure import Structure, read_structure
from lrmult._view import View, over
from lrmult._wrap import WrapState, read_optimizer


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
      training in part, and start afresh if their size changes. What has the shape of the array, or
      that shape behind other axes, is taken to be for each element.

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
        RuleError: if the state was made for other rules than the old ones, or by another optimizer,
            as far as that shows; if it keeps arrays whose parts cannot be told to be for one array
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
    inner = read_optimizer(optimizer)
    rules = Rules(old_rules), Rules(new_rules)
    structure = read_structure(structure)
    old, new = (
        View(cached_plan(each, params, structure, strict), compact, RunTime(each).packed)
        for each in rules
    )
    warned(old.plan)
    warned(new.plan)
    state = _read_state(opt_state)
    kept = {path[1:]: entry for path, entry in state.items() if path[:1] == ("inner_state",)}
    remedy = "pass the rules that it was made with as old_rules, and compact= as it was"
    check_state(inner, old, params, kept, remedy)
    owner = owners(inner, params)
    fresh = inner.init(new.narrow(params))
    carry = _Carry(old, new)
    all_leaves = jax.tree.leaves(params)
    arrays = [i for i, leaf in enumerate(all_leaves) if is_array(leaf)]
    leaves = [
        carry(arrays[owner[path]], kept.get(path), start)
        if path in owner
        else _going_on(path, kept.get(path), start)
        for path, start in entries(fresh).items()
        if is_array(start)
    ]
    inner_state = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
    rules_state = RunTime(rules[1]).init(all_leaves, new.plan.scales)
    return WrapState(inner_state, _rules_state(state, RunTime(rules[0]), rules_state))


def _read_state(state: Any) -> dict[Path, Any]:
    """The entries of a state of `wrap`.

    Raises:
        RuleError: if a state of `wrap` is somewhere within it.
    """
    is_plain = isinstance(state, Mapping) and state.keys() == set(WrapState._fields)
    if not isinstance(state, WrapState) and not is_plain:
        nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, WrapState))
        if any(isinstance(node, WrapState) for node in nodes):
            raise RuleError(
                "the state of lrmult.wrap is only a part of this state; migrate that part, as in "
                "optax.chain: (lrmult.migrate(state[0], ...), *state[1:])"
            )
        state = WrapState(state, optax.EmptyState())
    return entries(state)


def _rules_state(state: Mapping[Path, Any], old: RunTime, fresh: Any) -> Any:
    """What the new rules keep; the step of schedules goes on.

    Raises:
        MaskError: if the state was made for other masks than those of the old rules.
    """
    kept = {path[1:]: entry for path, entry in state.items() if path[:1] == ("rules_state",)}
    masks = [each for path, each in kept.items() if path[:1] == ("rules_masks",) and is_array(each)]
    old.check_masks(tuple(masks))
    step = kept.get(("rules_step",))
    if not is_array(step) or not isinstance(fresh, RulesState):
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
        then: what trained.
        now: what trains.
    """

    def __init__(self, then: View, now: View) -> None:
        self._then, self._now = then, now
        frozen = [view.plan.treedef.flatten_up_to(view.plan.frozen) for view in (then, now)]
        self._frozen = list(zip(*frozen, strict=True))

    def __call__(self, leaf: int, old: Any, fresh: Any) -> Any:
        """What the new state keeps in a place.

        Args:
            leaf: the number of the array among the leaves.
            old: what the old state keeps there, if anything.
            fresh: what a fresh state keeps there.
        """
        if not is_array(old):
            return fresh
        old = jnp.asarray(old)
        frozen = self._frozen[leaf]
        if _equal(*frozen):
            return old
        shape = self._now.plan.shapes[leaf]
        source, target = self._then.boxes[leaf], self._now.boxes[leaf]
        lead = old.ndim - len(shape)  # axes of its own, such as those of the history of lbfgs
        by_element = (
            lead >= 0
            and old.shape == old.shape[:lead] + source.size(shape)
            and np.shape(fresh) == old.shape[:lead] + target.size(shape)
        )
        if not by_element:  # statistics of rows and columns
            still, again = (each.dense() if isinstance(each, Parts) else each for each in frozen)
            goes_on = old.shape == np.shape(fresh) and not np.all(np.logical_or(still, again))
            return old if goes_on else fresh

        def carry(old: Any, fresh: Any) -> Any:
            begun = put_back(fresh, target, fresh)
            mixed = self._then.select(leaf, begun, put_back(old, source, old))
            return cut(self._now.select(leaf, begun, mixed), target)

        return over(lead, carry)(old, fresh)


def _equal(frozen: Any, other: Any) -> bool:
    """Whether the same is frozen of an array; both in their simplest form."""
    if isinstance(frozen, Parts) and isinstance(other, Parts):
        return np.array_equal(frozen.dense(), other.dense())
    if isinstance(frozen, Parts) or isinstance(other, Parts):
        return False
    return np.array_equal(frozen, other)
