"""What rules need at run time: the step of their schedules, and the bits of their masks."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lrmult._errors import MaskError, MultiplierError, RuleError, show
from lrmult._multipliers import Dynamic, is_schedule
from lrmult._regions import Mask
from lrmult._rules import Rules, name_rule
from lrmult._scaling import Scales, Value, explicit_sharding
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


class AtStep(NamedTuple):
    """What rules come to at one step.

    Attributes:
        values: the schedules and arrays among the multipliers, by `Dynamic.number`.
        packed: the bits of each element mask.
    """

    values: Mapping[int, Value]
    packed: Mapping[Mask, Any]


class RunTime:
    """What some rules need at run time, kept in a state where that is not nothing."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._masks = _masks_of(rules)
        self._stateful = bool(self._masks) or any(is_schedule(rule.multiplier) for rule in rules)
        # Arrays that were found to be right; jax's cannot be hashed, hence by their ids.
        self._right: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def init(
        self, arrays: Iterable[Any] = (), scales: Iterable[Scales] = ()
    ) -> optax.EmptyState | RulesState:
        """The state before the first step; masks lie as the arrays do that they are for."""
        if not self._stateful:
            return optax.EmptyState()
        homes = {
            mask: array
            for array, each in zip(arrays, scales, strict=True)
            for part in each
            for mask in part.region.masks
        }
        bits = tuple([_placed(mask.packed, homes.get(mask)) for mask in self._masks])
        return RulesState(jnp.zeros((), jnp.int32), bits)

    @property
    def packed(self) -> dict[Mask, Any]:
        """The bits of each element mask, as constants."""
        return {mask: mask.packed for mask in self._masks}

    def read(self, state: Any) -> tuple[AtStep, Any]:
        """What the rules come to now, and the state of the next step.

        Raises:
            MultiplierError: if a schedule gives no number.
            RuleError: if the state is of another transformation.
            MaskError: if its masks are of other rules; their bits are compared unless traced.
        """
        if not self._stateful:
            if isinstance(state, RulesState):
                raise RuleError(
                    "the state of the rules counts steps or holds masks, but these rules have "
                    "neither schedules nor element masks: it was made for other rules"
                )
            return AtStep(self._values(None), {}), state
        if not isinstance(state, RulesState):
            raise RuleError(
                f"the state of the rules is {show(state)}, but these rules have schedules or "
                "element masks, and keep a RulesState; call init again"
            )
        self.check_masks(state.rules_masks)
        at = AtStep(
            self._values(state.rules_step), dict(zip(self._masks, state.rules_masks, strict=True))
        )
        return at, state._replace(rules_step=optax.safe_increment(state.rules_step))

    def check_masks(self, bits: tuple[Any, ...]) -> None:
        """Hold the masks of a state against those of the rules.

        Raises:
            MaskError: if they are others.
        """
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

    def _values(self, step: Any) -> dict[int, Value]:
        """The schedules and arrays at a step, each distinct schedule evaluated once."""
        found: dict[int, Value] = {}
        for index, (rule, stand_in) in enumerate(
            zip(self._rules, self._rules.abstract, strict=True)
        ):
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
                    f"{name_rule(index, *rule)}: at a step it gave {show(got)}; a schedule takes "
                    "the step and returns one real number"
                ) from None
            found[dynamic.number] = Value(value, value == 0)
        return found


def _placed(bits: np.ndarray[Any, Any], array: Any) -> Any:
    """Bits where their array is, each device with those of its part of it, if that is possible."""
    sharding = getattr(array, "sharding", None)
    if isinstance(array, jax.core.Tracer):
        sharding = explicit_sharding(array)
    elif not (isinstance(array, jax.Array) and array.is_fully_addressable):
        sharding = None
    if not isinstance(sharding, NamedSharding) or not bits.ndim == array.ndim > 0:
        return jnp.asarray(bits)
    spec = [*sharding.spec, *[None] * (bits.ndim - len(sharding.spec))]
    if sharding.shard_shape(array.shape)[-1] % 8:  # a byte would hold bits of two devices
        spec[-1] = None
    wanted = sharding.update(spec=PartitionSpec(*spec))
    try:
        wanted.shard_shape(bits.shape)
    except ValueError:
        return jnp.asarray(bits)
    if isinstance(array, jax.core.Tracer):
        return jax.sharding.reshard(jnp.asarray(bits), wanted)
    return jax.device_put(bits, wanted)


def _masks_of(rules: Rules) -> list[Mask]:
    """The element masks of rules, each once."""
    found: dict[Mask, None] = {}
    for rule in rules:
        for restriction in rule.restrictions:
            if isinstance(restriction, Elements) and restriction.region:
                found.update(dict.fromkeys(restriction.region.masks))
    return list(found)


_OTHER_MASKS = (
    "the state holds other element masks than the rules have: it was made for "
    "other rules; restore the state with the rules that it was made with, or call init again"
)
