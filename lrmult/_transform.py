"""Rules applied to the updates of an optimizer."""

from typing import Any

import jax
import optax

from lrmult._attached import check_covered
from lrmult._levels import PyTree
from lrmult._plan import cached_plan, warned
from lrmult._rules import Rules, RulesLike
from lrmult._running import RunTime
from lrmult._scaling import scale
from lrmult._structure import Structure, read_structure


def scale_by_rules(
    rules: RulesLike, *, structure: Structure | None = None, strict: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Multiply the updates of every array by what the rules say; frozen arrays get no update.

    Chain it *after* an optimizer. There a multiplier is a multiplier on the learning rate,
    decoupled weight decay included, for all optimizers whose update is linear in their learning
    rate. Before Adam and its relatives, which divide by the size of the gradient, it does nothing.
    Nothing should come after it: weight decay would move what is frozen, and a factor such as the
    learning rate would turn the negative zeros below into positive ones. Wrappers that compute the
    parameters themselves (`optax.contrib.schedule_free`, `optax.lookahead`, `optax.contrib.sam`)
    stand outside, with the frozen rules once more after them; ``docs/optimizers.md`` has a row for
    each optimizer. What is frozen still counts in norms before it, and costs what it ever did: see
    `wrap`.

    * Frozen arrays keep every bit under any optimizer, weight decay and momentum, also where their
      gradient is NaN or infinite: their update is a constant negative zero, since adding ``+0.0``
      would turn a weight of ``-0.0`` into ``0.0``. Eagerly on CPU, where XLA flushes subnormal
      numbers in every addition, subnormal weights are the exception.
    * A multiplier of 1 adds no operation, and no dtype changes: for floats of 16 bits and fewer the
      product is taken in float32 and rounded once.
    * Integer, boolean, ``float0`` and key arrays pass through; frozen integers get zero.
    * Of an array that is frozen in part, the rest trains as ever. On CPU, where XLA flushes
      subnormal numbers in every addition, its frozen subnormal weights are flushed.

    Inside `jax.shard_map` rules see the block of an array that a device holds: a part along an axis
    that is split there is counted within each block, so apply such rules outside of it.

    Wrappers that make updates of their own add ``+0.0`` all the same: `optax.MultiSteps` while it
    accumulates, and `optax.apply_if_finite` when it rejects a step.

    The state is `optax.EmptyState`, but for schedules (the number of updates so far) and for
    element masks that are no outer product of vectors (one bit per element). Rules are resolved on
    the tree that ``update`` receives, while JAX traces it, and the plan is cached by everything but
    the values of run-time multipliers; ``init`` resolves them too, so that a mistake shows before
    the first step. It therefore works below `optax.masked`, `optax.partition`, `optax.MultiSteps`,
    `optax.inject_hyperparams`, and in `flax.nnx.Optimizer`, where ``init`` and ``update`` see
    different trees. A predicate sees the dtypes of the tree at hand: those of the parameters in
    ``init``, those of the updates in ``update``.

    Args:
        rules: see `Rules`.
        structure: as for `compile_rules`.
        strict: as for `compile_rules`.

    Returns:
        A gradient transformation.

    Raises:
        LrmultError: at once if a rule cannot be read; from ``init`` and ``update`` what
            `compile_rules` raises. ``init`` raises a RuleError if it sees a multiplier that is
            attached to an array (see `attach`) and no rule that speaks of it. ``update`` raises a
            MaskError, unless it is traced, if the masks in its state are not those of the rules.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> import optax
        >>> params = {"trunk": jnp.array([1.0, 2.0]), "head": jnp.array([3.0])}
        >>> tx = optax.chain(optax.sgd(0.1), lm.scale_by_rules([("head", 5), (..., None)]))
        >>> state = tx.init(params)
        >>> grads = {"trunk": jnp.array([1.0, jnp.nan]), "head": jnp.array([1.0])}
        >>> updates, state = tx.update(grads, state, params)
        >>> new = optax.apply_updates(params, updates)
        >>> print(new["trunk"], new["head"])
        [1. 2.] [2.5]
    """
    read, structure = Rules(rules), read_structure(structure)
    running = RunTime(read)

    def init(params: PyTree) -> Any:
        # optax itself calls `init` with a placeholder that has no leaves: nothing to check there.
        leaves = jax.tree.leaves(params)
        if not leaves:
            return running.init()
        plan = warned(cached_plan(read, params, structure, strict), params)
        check_covered(read, params, structure, strict)
        return running.init(leaves, plan.scales)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        plan = cached_plan(read, updates, structure, strict)
        at, state = running.read(state)
        scaled = [
            scale(leaf, scales, *at) for leaf, scales in zip(leaves, plan.scales, strict=True)
        ]
        return jax.tree.unflatten(treedef, scaled), state

    return optax.GradientTransformationExtraArgs(init, update)
