"""Rules applied to the updates of an optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lrmult._paths import PyTree
from lrmult._plan import cached_plan, warned
from lrmult._rules import Rules, RulesLike


def scale_by_rules(
    rules: RulesLike, *, strict: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Multiply the updates of every array by what the rules say; frozen arrays get no update.

    Chain it *after* an optimizer. There a multiplier is a multiplier on the learning rate,
    decoupled weight decay included, for all optimizers whose update is linear in their learning
    rate. Before Adam and its relatives, which divide by the size of the gradient, it does nothing.
    Nothing should come after it: weight decay would move what is frozen, and a factor such as the
    learning rate would turn the negative zeros below into positive ones.

    * Frozen arrays keep every bit under any optimizer, weight decay and momentum, also where their
      gradient is NaN or infinite: their update is a constant negative zero, since adding ``+0.0``
      would turn a weight of ``-0.0`` into ``0.0``. Eagerly on CPU, where XLA flushes subnormal
      numbers in every addition, subnormal weights are the exception.
    * A multiplier of 1 adds no operation, and no dtype changes: for floats of 16 bits and fewer the
      product is taken in float32 and rounded once.
    * Integer, boolean, ``float0`` and key arrays pass through; frozen integers get zero.

    The transformation keeps no state. Rules are resolved on the tree that ``update`` receives,
    while JAX traces it, and the plan is cached; ``init`` resolves them too, so that a mistake shows
    before the first step. It therefore works below `optax.masked`, `optax.partition`,
    `optax.MultiSteps`, `optax.inject_hyperparams`, and in `flax.nnx.Optimizer`, where ``init`` and
    ``update`` see different trees. A predicate sees the dtypes of the tree at hand: those of the
    parameters in ``init``, those of the updates in ``update``.

    Args:
        rules: see `Rules`.
        strict: as for `compile_rules`.

    Returns:
        A gradient transformation.

    Raises:
        LrmultError: at once if a rule cannot be read; from ``init`` and ``update`` what
            `compile_rules` raises.

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
    read = Rules(rules)

    def init(params: PyTree) -> optax.EmptyState:
        # optax itself calls `init` with a placeholder that has no leaves: nothing to check there.
        if jax.tree.leaves(params):
            warned(cached_plan(read, params, strict))
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        multipliers = cached_plan(read, updates, strict).flat_multipliers
        return jax.tree.unflatten(treedef, map(_scale, leaves, multipliers)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _scale(update: Any, multiplier: float) -> Any:
    """The update times the multiplier, in the update's dtype."""
    if multiplier == 1:
        return update
    dtype = getattr(update, "dtype", None)
    if dtype is None:
        update = jnp.asarray(update)
        dtype = update.dtype
    # Outside a trace one compiled call costs a fraction of the operations that it is made of.
    eager = isinstance(update, jax.Array) and not isinstance(update, jax.core.Tracer)
    if multiplier == 0:
        if dtype == jax.dtypes.float0 or jnp.issubdtype(dtype, jax.dtypes.extended):
            return update  # float0 holds no bits; a key cannot be added to
        return _no_update_eagerly(update) if eager else _no_update(update)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return update
    return _times_eagerly(update, multiplier) if eager else _times(update, multiplier)


def _times(update: Any, multiplier: Any) -> Any:
    if update.dtype.itemsize < 4:
        return (update.astype(jnp.float32) * multiplier).astype(update.dtype)
    return update * multiplier


def _no_update(update: Any) -> Any:
    """What leaves every bit of a parameter as it is when it is added."""
    zero: complex = 0
    if jnp.issubdtype(update.dtype, jnp.inexact):
        is_complex = jnp.issubdtype(update.dtype, jnp.complexfloating)
        zero = complex(-0.0, -0.0) if is_complex else -0.0
    like = np if isinstance(update, np.ndarray | np.generic) else jnp
    return like.full_like(update, zero)


_times_eagerly = jax.jit(_times)


@jax.jit
def _no_update_eagerly(update: Any) -> Any:
    # The result must hang on the update, or a sharded one would give a replicated result.
    zeros = _no_update(update)
    return jnp.where(jax.lax.optimization_barrier(update) == update, zeros, zeros)
