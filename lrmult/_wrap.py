"""Freezing that saves: an optimizer that sees only what trains."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lrmult._attached import check_covered
from lrmult._errors import RuleError, show
from lrmult._levels import PyTree, entries
from lrmult._plan import cached_plan, warned
from lrmult._regions import Mask
from lrmult._rules import Rules, RulesLike
from lrmult._running import RulesState, RunTime
from lrmult._scaling import scale
from lrmult._states import check_state, explain_failure
from lrmult._structure import Structure, read_structure
from lrmult._view import View


class WrapState(NamedTuple):
    """What `wrap` keeps.

    Attributes:
        inner_state: the state of the optimizer, in which nothing is kept for what is frozen.
        rules_state: what the rules keep: the step of schedules, and the bits of element masks.
    """

    inner_state: Any
    rules_state: optax.EmptyState | RulesState


def wrap(
    optimizer: optax.GradientTransformation,
    rules: RulesLike,
    *,
    compact: bool = False,
    structure: Structure | None = None,
    strict: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer on what trains alone, its updates multiplied by what the rules say.

    What is trained and by how much is as in ``optax.chain(optimizer, scale_by_rules(rules))``, but
    freezing saves:

    * nothing in the optimizer's state is for a frozen array: `optax.MaskedNode` stands there;
    * its gradient is never read, so within one ``jit`` XLA does no work for it. (Where gradients
      leave the ``jit``, use `stop_frozen` in the loss.) Nor can a NaN or a large value in it reach
      anything else, through the global norm of clipping for instance;
    * where an array is frozen in part, the optimizer sees zeros for these elements of gradients and
      parameters, so that the norms of `optax.lars` or `optax.adafactor` do not count them either;
    * with ``compact=True`` it sees only the sub-array of places along each axis where anything
      trains, and its state is as small. Optimizers that treat elements alone do the same as
      without; those that look at whole matrices (muon, lamb, adafactor) take the sub-array for the
      matrix, which is another, equally honest meaning than a matrix with zeros. Where places are
      sharded among devices, to cut some out takes communication.

    The whole chain belongs inside: `optax.clip_by_global_norm`, `optax.MultiSteps`,
    `optax.apply_if_finite`, weight decay. Outside they read every gradient, and the work that was
    to be saved is done after all. Schedules among the multipliers are evaluated at the number of
    updates of the wrapper, which counts micro-steps if `optax.MultiSteps` is inside.

    Extra arguments are translated: what is structured like the updates (``grad``) is narrowed to
    what trains, a function (``value_fn`` of a line search, ``obj_fn`` of sophia) is called with
    parameters in full, and all else (``value``) is handed on. `optax.value_and_grad_from_state` has
    no use here, since the gradient that the state holds is narrow; take `jax.value_and_grad`.
    Updates may have an axis of examples in front (`optax.contrib.dpsgd`), if the parameters are
    passed too.

    Args:
        optimizer: an optax gradient transformation.
        rules: see `Rules`. What has a static multiplier of zero is frozen; a schedule that is 0 at
            a step is not, and keeps its state.
        compact: whether arrays that are frozen along axes are cut down to what trains.
        structure: as for `compile_rules`.
        strict: as for `compile_rules`.

    Returns:
        A gradient transformation. Its updates are structured like the parameters; what is frozen
        gets a negative zero, which changes no bit.

    Raises:
        LrmultError: at once if a rule cannot be read; from ``init`` and ``update`` what
            `compile_rules` raises. ``init`` raises a RuleError if it sees a multiplier that is
            attached to an array (see `attach`) and no rule that speaks of it; ``update`` if its
            state was made for other rules, as far as that shows: by which arrays train, or in the
            compact form by shapes; or if the optimizer fails and its state, the updates and the
            parameters are not for one tree.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> import optax
        >>> params = {"trunk": jnp.ones((3, 3)), "head": jnp.ones(3)}
        >>> tx = lm.wrap(optax.adam(0.1), [("trunk", None), ("head", 2)])
        >>> state = tx.init(params)
        >>> optax.tree.get(state, "mu")
        {'head': Array([0., 0., 0.], dtype=float32), 'trunk': MaskedNode()}
        >>> grads = {"trunk": jnp.full((3, 3), jnp.nan), "head": jnp.ones(3)}
        >>> updates, state = tx.update(grads, state, params)
        >>> print(updates["head"].round(3), updates["trunk"][0])
        [-0.2 -0.2 -0.2] [-0. -0. -0.]
    """
    inner = read_optimizer(optimizer)
    read, structure = Rules(rules), read_structure(structure)
    running = RunTime(read)
    checked: list[Any] = []

    def view(tree: PyTree, packed: Mapping[Mask, Any]) -> View:
        return View(cached_plan(read, tree, structure, strict), compact, packed)

    def init(params: PyTree) -> WrapState:
        # optax itself calls `init` with a placeholder that has no leaves.
        leaves = jax.tree.leaves(params)
        if not leaves:
            return WrapState(inner.init(params), running.init())
        seen = view(params, running.packed)
        warned(seen.plan, params)
        check_covered(read, params, structure, strict)
        return WrapState(inner.init(seen.narrow(params)), running.init(leaves, seen.plan.scales))

    def check(state: Any, seen: View, params: PyTree) -> None:
        """See that a state was made for what trains: once for each kind of state."""
        leaves, treedef = jax.tree.flatten(state)
        kind = seen.plan, treedef, [np.shape(leaf) for leaf in leaves]
        if kind not in checked:
            check_state(inner, seen, params, entries(state), _REMEDY)
            checked[:] = [kind, *checked[:7]]

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, WrapState]:
        if not isinstance(state, WrapState):
            raise RuleError(
                f"the state is {show(state)}, but wrap keeps a WrapState; call init, or make it "
                "one with lrmult.migrate(state, params, optimizer, old_rules, new_rules)"
            )
        at, rules_state = running.read(state.rules_state)
        # The parameters decide what is frozen, as in `init`: updates may have other dtypes.
        given = updates if params is None else params
        seen = view(given, at.packed)
        check(state.inner_state, seen, given)
        of_updates = seen
        if jax.tree.structure(updates) != seen.plan.treedef:
            of_updates = view(updates, at.packed)
        try:
            narrow, inner_state = inner.update(
                of_updates.narrow(updates),
                state.inner_state,
                None if params is None else seen.narrow(params),
                **_translated(extra_args, of_updates, seen, params),
            )
        except (TypeError, ValueError) as error:  # what JAX raises where trees are unlike
            cause = explain_failure(inner, seen, given, updates, entries(state.inner_state))
            if cause is None:
                raise
            raise RuleError(cause) from error
        scaled = [
            scale(leaf, scales, *at)
            for leaf, scales in zip(
                of_updates.put_back(narrow, updates), of_updates.plan.scales, strict=True
            )
        ]
        return of_updates.plan.treedef.unflatten(scaled), WrapState(inner_state, rules_state)

    return optax.GradientTransformationExtraArgs(init, update)


_REMEDY = (
    "use the rules that it was made with, or carry it over with "
    "lrmult.migrate(state, params, optimizer, old_rules, new_rules)"
)


def read_optimizer(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """An optimizer, with support for extra arguments.

    Raises:
        RuleError: if it is none.
    """
    if isinstance(optimizer, optax.MultiSteps):
        return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise RuleError(
            f"{show(optimizer)} is no optimizer; write lrmult.wrap(optimizer, rules) with an "
            "optax.GradientTransformation such as optax.adamw(1e-3)"
        )
    return optax.with_extra_args_support(optimizer)


def _translated(
    extra_args: Mapping[str, Any], of_updates: View, of_params: View, params: PyTree
) -> dict[str, Any]:
    """Extra arguments as the optimizer is to see them.

    What is like the updates is narrowed. A function is called with all of this in full again, the
    parameters first; what it returns is narrowed if it is like the updates.
    """
    narrowed = {
        name: of_updates.narrow(value)
        for name, value in extra_args.items()
        if of_updates.is_full(value)
    }

    def translated(name: str, function: Any) -> Any:
        if name in narrowed:
            return narrowed[name]
        # A tree of arrays may be callable too: a module that is handed on.
        is_function = name.endswith("_fn") or jax.tree_util.all_leaves([function])
        if params is None or not callable(function) or not is_function:
            return function

        @functools.wraps(function)  # optax reads its signature
        def of_narrow(first: PyTree, *args: Any, **kwargs: Any) -> Any:
            if of_params.is_narrow(first):
                first = of_params.widen(first, params)
            for name in narrowed.keys() & kwargs.keys():
                if of_updates.is_narrow(kwargs[name]):
                    kwargs[name] = of_updates.widen(kwargs[name], extra_args[name])
            result = function(first, *args, **kwargs)
            return of_updates.narrow(result) if of_updates.is_full(result) else result

        return of_narrow

    return {name: translated(name, value) for name, value in extra_args.items()}
