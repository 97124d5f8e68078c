"""Whether what a front makes of an example will always be the same."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrmult._cuts import Examples
from lrmult._errors import FeaturesError
from lrmult._programs import RANDOM, Equation, walk
from lrmult._splitting import Feature, Split, origin_of
from lrmult._work import Kind, jaxprs_in, kind_of

ONCE = (
    "would be the same whenever the example is seen; leave it out of the batch, and pass it to "
    "loss_fn as a further argument"
)
_HARMLESS = ("debug_callback", "debug_print")


def check_program(split: Split) -> None:
    """Raise if features could not be kept: those of random numbers, effects, or mixed examples.

    Raises:
        FeaturesError: if so.
    """
    reason = next(filter(None, _reasons(split)), "")
    if reason:
        raise FeaturesError(f"features cannot be kept and used again: {reason}")


def _reasons(split: Split) -> Iterator[str]:
    for op in walk(split.front_ops):
        if isinstance(op, Equation):
            yield _of_equation(op, split.examples)
    for feature in split.features:
        if jnp.issubdtype(feature.dtype, jax.dtypes.prng_key):
            yield f"a random key ({feature.origin}) would be handed on, which {ONCE}"
    for op in walk(split.rest_ops):
        if isinstance(op, Equation):
            if _names_of(op) & RANDOM and any(v.known and v.of_batch for v in op.reads):
                yield f"the seed of random numbers would be handed on, which {ONCE}"
            kinds = frozenset().union(*[value.kinds for value in op.reads])
            of_both = any(v.of_params for v in op.reads) and any(v.of_batch for v in op.reads)
            works = of_both and kind_of(op.name) == Kind.WORKS
            if works and "random" in kinds and "trains" not in kinds:
                cause = next(value.cause for value in op.reads if value.cause)
                yield (
                    f"{origin_of(op.makes[0])} does not train, but is behind random numbers, since "
                    f"it needs {cause}; {_LEAVE_OUT}"
                )
    value = split.mixed()
    if value is not None:
        mixing = split.examples.mixes.get(value)
        place = origin_of(mixing.makes[0] if mixing else value)
        yield (
            f"the frozen part mixes the examples of a batch ({place}), so that the features of one "
            "depend on the others, as in batch normalization in training mode "
            "(use_running_average=True, or model.eval(), takes running averages)"
        )


_LEAVE_OUT = (
    "have dropout and augmentation left out there (deterministic=True, or model.eval()), or apply "
    "them behind what is frozen"
)


def _of_equation(op: Equation, examples: Examples) -> str:
    names = _names_of(op)
    place = origin_of(op.makes[0]) if op.makes else op.name
    if names & RANDOM:
        if any(value.of_batch for value in op.reads):
            return f"the frozen part draws random numbers from a seed in the batch, which {ONCE}"
        # Constants, such as random projections, are drawn anew each time, and are the same.
        if any(value.of_params for value in op.reads) or not examples.sized.isdisjoint(op.makes):
            return f"the frozen part draws random numbers ({place}); {_LEAVE_OUT}"
    if op.eqn.effects and not names & set(_HARMLESS):
        return f"the frozen part has an effect on the host ({place}), which would happen only once"
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
    features: tuple[Feature, ...], runs: Sequence[tuple[Sequence[int], tuple[Any, ...]]]
) -> None:
    """Raise if features of examples are others among other examples, or in other places.

    Args:
        features: what is known of each of them.
        runs: for two batches, the numbers of their examples, and their features.

    Raises:
        FeaturesError: if so.
    """
    (first, one), (second, two) = runs
    places = {number: place for place, number in enumerate(first)}
    both = [(places[number], place) for place, number in enumerate(second) if number in places]
    for feature, before, after in zip(features, one, two, strict=True):
        before, after = np.asarray(before), np.asarray(after)
        if feature.axis is not None:
            before, after = by_example(before, feature), by_example(after, feature)
            before, after = before[[i for i, _ in both]], after[[i for _, i in both]]
        if not _are_alike(before, after):
            raise FeaturesError(
                f"the features of an example ({feature.origin}) hang on its place in the batch or "
                "on the other examples, as a trial shows, and would not stay what they are; have "
                "the frozen part treat each example alone"
            )


def trial_batches(size: int, count: int) -> tuple[Any, Any]:
    """Numbers of examples of two batches. Those in both are in other places and other company."""
    draw = np.random.default_rng(0)
    spread = np.unique(np.linspace(0, count - 1, 2 * size).astype(int))
    one = np.resize(draw.permutation(spread), size)
    shared = draw.permutation(one[: (size + 1) // 2])
    others = np.setdiff1d(spread, one)
    left = size - len(shared)
    fill = draw.permutation(others)[:left] if len(others) else shared
    two = draw.permutation(np.concatenate([shared, np.resize(fill, left)]))
    return one, two


def by_example(array: Any, feature: Feature) -> Any:
    """Features with the examples along the first axis, and the rows of each along the second."""
    array = np.moveaxis(np.asarray(array), feature.axis or 0, 0)
    return array.reshape(-1, feature.rows, *array.shape[1:])


def _are_alike(one: Any, two: Any) -> bool:
    """Whether features are the same but for roundings, beside the largest of each example."""
    if not one.size:
        return True
    if not jnp.issubdtype(one.dtype, jnp.inexact):
        differ = one != two
        steps = np.abs(one.astype(float) - two.astype(float))
        return not differ.any() or bool(differ.mean() < 0.01 and steps.max() <= 1)
    close = {1: 0.3, 2: 0.02, 4: 1e-4}.get(one.dtype.itemsize, 1e-7)
    one, two = (each.astype(complex if np.iscomplexobj(each) else float) for each in (one, two))
    axes = tuple(range(1, one.ndim))
    finite = np.where(np.isfinite(one), np.abs(one), 0)
    largest = finite.max(axis=axes, keepdims=True, initial=0)
    with np.errstate(invalid="ignore"):
        near = (np.abs(one - two) <= close * largest) | (one == two)
    return bool((near | (np.isnan(one) & np.isnan(two))).all())
