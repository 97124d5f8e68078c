"""Rules applied to the updates of an optimizer."""

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lrmult._errors import MaskError, MultiplierError, RuleError, show
from lrmult._multipliers import Dynamic, is_schedule
from lrmult._paths import PyTree
from lrmult._plan import cached_plan, warned
from lrmult._regions import Mask
from lrmult._rules import Rules, RulesLike, name_rule
from lrmult._scaling import Value, scale
from lrmult._structure import Structure, read_structure
from lrmult._targets import Elements


class RulesState(NamedTuple):
    """What `scale_by_rules` keeps where there are schedules or element masks.

    Attributes:
        rules_step: the number of updates so far, int32: what schedules are evaluated at.
        rules_masks: for each mask of `elements` that is no outer product of vectors, its bits as
            uint8, packed along the last axis, so that it can be sharded as its array is.
    """

    rules_step: jax.Array
    rules_masks: tuple[jax.Array, ...]


def scale_by_rules(
    rules: RulesLike, *, structure: Structure | None = None, strict: bool = True
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

    * Of an array that is frozen in part, the rest trains as ever. On CPU, where XLA flushes
      subnormal numbers in every addition, its frozen subnormal weights are flushed.

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
            `compile_rules` raises. ``update`` raises a MaskError, unless it is traced, if the masks
            in its state are not those of the rules.

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
    masks = _masks(read)
    stateful = bool(masks) or any(is_schedule(rule.multiplier) for rule in read)
    known = _KnownMasks(masks)

    def init(params: PyTree) -> optax.EmptyState | RulesState:
        # optax itself calls `init` with a placeholder that has no leaves: nothing to check there.
        if jax.tree.leaves(params):
            warned(cached_plan(read, params, structure, strict))
        if not stateful:
            return optax.EmptyState()
        bits = tuple([jnp.asarray(mask.packed) for mask in masks])
        return RulesState(jnp.zeros((), jnp.int32), bits)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        plan = cached_plan(read, updates, structure, strict)
        packed: Mapping[Mask, Any] = {}
        step = None
        if stateful:
            packed = known.of(state)
            step = state.rules_step
            state = state._replace(rules_step=optax.safe_increment(step))
        values = _values(read, step)
        scaled = [
            scale(leaf, scales, values, packed)
            for leaf, scales in zip(leaves, plan.scales, strict=True)
        ]
        return jax.tree.unflatten(treedef, scaled), state

    return optax.GradientTransformationExtraArgs(init, update)


def _masks(rules: Rules) -> list[Mask]:
    """The element masks of rules, each once."""
    found: dict[Mask, None] = {}
    for rule in rules:
        for restriction in rule.restrictions:
            if isinstance(restriction, Elements) and restriction.region:
                found.update(dict.fromkeys(restriction.region.masks))
    return list(found)


def _values(rules: Rules, step: Any) -> dict[int, Value]:
    """The schedules and arrays of rules at this step, each distinct schedule evaluated once."""
    found: dict[int, Value] = {}
    for index, (rule, stand_in) in enumerate(zip(rules, rules.abstract, strict=True)):
        dynamic, multiplier = stand_in.multiplier, rule.multiplier
        if not isinstance(dynamic, Dynamic) or dynamic.number in found:
            continue
        if not is_schedule(multiplier):
            found[dynamic.number] = Value(multiplier)
            continue
        got = multiplier(step)
        try:
            value = jnp.asarray(got)
            if value.shape != () or value.dtype.kind not in "fiuV":  # V: bfloat16 and its like
                raise TypeError
        except (TypeError, ValueError):
            raise MultiplierError(
                f"{name_rule(index, *rule)}: at a step it gave {show(got)}; a schedule takes the "
                "step and returns one real number"
            ) from None
        found[dynamic.number] = Value(value, value == 0)
    return found


class _KnownMasks:
    """The masks of a transformation, held against those in its state."""

    def __init__(self, masks: list[Mask]) -> None:
        self._masks = masks
        # Arrays that were found to be right; jax's cannot be hashed, hence by their ids.
        self._right: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def of(self, state: Any) -> dict[Mask, Any]:
        """The bits of each mask, from a state.

        Raises:
            RuleError: if the state is of another transformation.
            MaskError: if its masks are of other rules; their bits are compared unless traced.
        """
        if not isinstance(state, RulesState):
            raise RuleError(
                f"the state of scale_by_rules is {show(state)}, but these rules have schedules or "
                "element masks, and keep a RulesState; call init again"
            )
        bits = state.rules_masks
        if [b.shape for b in bits] != [mask.packed.shape for mask in self._masks]:
            raise MaskError(_OTHER_MASKS)
        for mask, array in zip(self._masks, bits, strict=True):
            if isinstance(array, jax.core.Tracer) or self._right.get(id(array)) is array:
                continue
            if isinstance(array, jax.Array) and not array.is_fully_addressable:
                continue
            if not np.array_equal(array, mask.packed):
                raise MaskError(_OTHER_MASKS)
            if isinstance(array, jax.Array):
                self._right[id(array)] = array
        return dict(zip(self._masks, bits, strict=True))


_OTHER_MASKS = (
    "the state of scale_by_rules holds other element masks than its rules have: it was made for "
    "other rules; restore the state with the rules that it was made with, or call init again"
)
