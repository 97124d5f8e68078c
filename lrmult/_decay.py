"""Weight decay with multipliers of its own."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lrmult._errors import RuleError, show
from lrmult._levels import PyTree
from lrmult._plan import cached_plan, warned
from lrmult._rules import Rules, RulesLike
from lrmult._running import AtStep, RunTime
from lrmult._scaling import Scales, is_frozen, is_opaque, scale, select
from lrmult._structure import Structure, read_structure


class DecayState(NamedTuple):
    """What `scale_decay` keeps.

    Attributes:
        decay_rules: what `lrmult.scale_by_rules` keeps for such rules.
        decay_rate: what `optax.add_decayed_weights` keeps for such a rate.
    """

    decay_rules: Any
    decay_rate: Any


def scale_decay(
    weight_decay: optax.ScalarOrSchedule,
    rules: RulesLike,
    *,
    structure: Structure | None = None,
    strict: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Add decayed weights to the updates, each array's by a multiplier of its own.

    That is `optax.add_decayed_weights`, where the rules say how fast each parameter decays: what
    is 1 (no rule matches) by `weight_decay`, what is frozen not at all, and its update keeps every
    bit. What the multipliers on the learning rate do to the decay is a matter of the order in a
    chain. There are three usual ones:

    * ``chain(scale_decay(wd, decays), adam(lr), scale_by_rules(rates))``: the decay is part of the
      gradient (L2 regularization), and of its moments, as ``weight_decay`` of PyTorch's ``SGD`` and
      ``Adam``;
    * ``chain(scale_by_adam(), scale_decay(wd, decays), scale_by_learning_rate(lr),
      scale_by_rules(rates))``: decoupled, and follows the multiplier: what learns at a tenth of the
      rate decays at a tenth. So do `optax.adamw` before rules, and the parameter groups of
      PyTorch's ``AdamW``, on which the ``decay_mult`` of mmengine and the layer decay of BEiT rest;
    * ``chain(scale_by_adam(), scale_by_rules(rates), scale_decay(wd, decays),
      scale_by_learning_rate(lr), scale_by_rules(frozen))``: decoupled, and does not follow: all
      decay at the full rate, but for what the decay rules say. Decay then reaches what `rates`
      froze, unless it is frozen once more at the end.

    With `wrap` around the first two, or around all of the third but its end, what is frozen is not
    there to decay.

    Args:
        weight_decay: the rate of what has the multiplier 1, or an `optax.Schedule` of it.
        rules: see `Rules`; ``[("**/{bias,scale}", None)]`` is the usual list.
        structure: as for `compile_rules`.
        strict: as for `compile_rules`.

    Returns:
        A gradient transformation, whose ``update`` needs the parameters.

    Raises:
        LrmultError: at once if a rule cannot be read; from ``init`` and ``update`` what
            `compile_rules` raises.
        ValueError: from ``update`` without parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import lrmult as lm
        >>> import optax
        >>> params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
        >>> decays = [("bias", None)]
        >>> tx = optax.chain(lm.scale_decay(0.5, decays), optax.scale_by_learning_rate(0.1))
        >>> grads = jax.tree.map(jnp.zeros_like, params)
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> new = optax.apply_updates(params, updates)
        >>> print(new["kernel"], new["bias"])
        [1.9] [2.]
    """
    is_number = isinstance(weight_decay, numbers.Real | jax.Array | np.ndarray)
    if not callable(weight_decay) and not (
        is_number and np.ndim(weight_decay) == 0 and not isinstance(weight_decay, bool)
    ):
        raise RuleError(
            f"scale_decay: weight_decay is {show(weight_decay)}; write a number or a schedule "
            "first, and then the rules"
        )
    read, structure = Rules(rules), read_structure(structure)
    running, decay = RunTime(read), optax.add_decayed_weights(weight_decay)

    def init(params: PyTree) -> DecayState:
        leaves = jax.tree.leaves(params)
        if not leaves:
            return DecayState(running.init(), decay.init(params))
        plan = warned(cached_plan(read, params, structure, strict), params)
        return DecayState(running.init(leaves, plan.scales), decay.init(params))

    def update(
        updates: PyTree, state: DecayState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, DecayState]:
        del extra_args
        if params is None:
            raise ValueError("scale_decay needs the parameters: update(updates, state, params)")
        if not isinstance(state, DecayState):
            raise RuleError(
                f"the state is {show(state)}, but scale_decay keeps a DecayState; call init"
            )
        treedef: Any
        weights, treedef = jax.tree.flatten(params)
        plan = cached_plan(read, params, structure, strict)
        at, rules_state = running.read(state.decay_rules)
        before = treedef.flatten_up_to(updates)
        scaled = [_decaying(*each, at) for each in zip(before, weights, plan.scales, strict=True)]
        pairs = [(u, w) for u, w in zip(before, scaled, strict=True) if w is not None]
        after, rate_state = decay.update(
            [u for u, _ in pairs], state.decay_rate, [w for _, w in pairs]
        )
        decayed = iter(after)
        leaves = [
            u
            if w is None
            else select(scales, at.packed, u, next(decayed).astype(jnp.result_type(u)))
            for u, w, scales in zip(before, scaled, plan.scales, strict=True)
        ]
        return treedef.unflatten(leaves), DecayState(rules_state, rate_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _decaying(update: Any, weight: Any, scales: Scales, at: AtStep) -> Any:
    """A weight by its multiplier; None if it does not decay, as numbers do that are no floats."""
    if update is None or is_opaque(weight) or is_frozen(scales):
        return None
    if not all(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in (update, weight)):
        return None
    return scale(weight, scales, *at)
