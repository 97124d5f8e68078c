"""Whether what a front makes of an example will always be the same."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrmult._cuts import Examples
from lrmult._errors import FeaturesError
from lrmult._programs import Equation, walk
from lrmult._splitting import Feature, Split, origin_of
from lrmult._work import jaxprs_in

_RANDOM = frozenset(
    ["random_bits", "random_gamma", "rng_bit_generator", "rng_uniform", "threefry2x32"]
)
_ONCE = (
    "would be the same whenever the example is seen; leave it out of the batch, and pass it to "
    "loss_fn as a further argument"
)
_HARMLESS = ("debug_callback", "debug_print")


def check_program(split: Split) -> None:
    """Raise if a front draws random numbers, has effects, or mixes examples.

    Raises:
        FeaturesError: if so.
    """
    reason = ""
    for op in walk(split.front_ops):
        if isinstance(op, Equation):
            reason = reason or _of_equation(op, split.examples)
    for feature in split.features:
        if jnp.issubdtype(feature.dtype, jax.dtypes.prng_key):
            reason = reason or f"hands on a random key ({feature.origin}), which {_ONCE}"
    for op in walk(split.rest_ops):
        drawn = isinstance(op, Equation) and _names_of(op) & _RANDOM
        if drawn and any(v.known and v.of_batch for v in op.reads):
            reason = reason or f"hands on the seed of random numbers, which {_ONCE}"
    value = split.mixed()
    if value is not None and not reason:
        mixing = split.examples.mixes[value] if split.examples else None
        place = origin_of(mixing.makes[0]) if mixing else "a loop over examples"
        reason = (
            f"it mixes the examples of a batch ({place}), as batch normalization in training mode "
            "does; have it use running averages (use_running_average=True, or model.eval())"
        )
    if not split.gains and not reason:
        reason = split.obstacle() if "a further argument" in split.obstacle() else ""
    if reason:
        raise FeaturesError(f"features cannot be kept and used again: the frozen part {reason}")


def _of_equation(op: Equation, examples: Examples | None) -> str:
    names = _names_of(op)
    place = origin_of(op.makes[0]) if op.makes else op.name
    if names & _RANDOM:
        # Constants, such as random projections, are drawn anew each time, and are the same.
        same = examples is not None and examples.sized.isdisjoint(op.makes)
        if any(value.of_batch for value in op.reads):
            return f"draws random numbers from a seed in the batch ({place}), which {_ONCE}"
        if not (same and all(value.given for value in op.makes)):
            return (
                f"draws random numbers ({place}), for dropout or augmentation; have it leave them "
                "out (deterministic=True, or model.eval()), or apply them behind what is frozen"
            )
    if op.eqn.effects and not names & set(_HARMLESS):
        return f"has an effect on the host ({place}), which would happen only once"
    return ""


def _names_of(op: Equation) -> set[str]:
    """The primitives that an equation is made of."""
    return {op.name, *_names_in(op.eqn)}


def _names_in(eqn: Any) -> Iterator[str]:
    """The primitives in the jaxprs of an equation."""
    for jaxpr in jaxprs_in(eqn.params.values()):
        for inner in jaxpr.eqns:
            yield inner.primitive.name
            yield from _names_in(inner)


def check_trial(
    features: tuple[Feature, ...], before: tuple[Any, ...], after: tuple[Any, ...]
) -> None:
    """Raise if features of examples are others among other examples, or in other places.

    Args:
        features: what is known of each of them.
        before: those of a batch.
        after: those of the batch that `moved` makes of it.

    Raises:
        FeaturesError: if so.
    """
    for feature, one, two in zip(features, before, after, strict=True):
        if feature.axis is not None:
            one, two = by_example(one, feature), by_example(two, feature)
            half = len(one) // 2
            one, two = one[:half], two[1 : half + 1]
        if not _are_alike(np.asarray(one), np.asarray(two)):
            raise FeaturesError(
                f"the features of an example ({feature.origin}) hang on its place in the batch or "
                "on the other examples, as a trial shows, and would not stay what they are; have "
                "the frozen part treat each example alone"
            )


def moved(size: int) -> Any:
    """Numbers of examples of a batch: the first half one place later, and others elsewhere."""
    half = size // 2
    return np.concatenate([[half], np.arange(half), np.full(size - half - 1, half)]).astype(int)


def by_example(array: Any, feature: Feature) -> Any:
    """Features with the examples along the first axis, and the rows of each along the second."""
    array = np.moveaxis(np.asarray(array), feature.axis or 0, 0)
    return array.reshape(-1, feature.rows, *array.shape[1:])


def _are_alike(one: Any, two: Any) -> bool:
    if not jnp.issubdtype(one.dtype, jnp.inexact):
        return bool((one == two).mean() > 0.99) if one.size else True
    exact = one.dtype.itemsize > 2
    one, two = (each.astype(complex if np.iscomplexobj(each) else float) for each in (one, two))
    largest = np.nanmax(np.abs(one), initial=0.0)
    near = np.isclose(one, two, rtol=0, atol=(1e-3 if exact else 0.05) * largest, equal_nan=True)
    return bool(near.all())
