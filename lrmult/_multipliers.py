"""Multipliers: how fast what a rule speaks of learns, and how that is read."""

import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from lrmult._errors import MultiplierError, show, spec
from lrmult._schedules import During

Schedule: TypeAlias = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Stands for a schedule or an array in a plan that is made before its value is known.

    Attributes:
        number: the place in the list of the first rule that has it.
        is_schedule: which of the two it is.
        text: how messages show it.
    """

    number: int
    is_schedule: bool
    text: str


# None is frozen; an array is a value that may be known at run time only.
Multiplier: TypeAlias = float | Schedule | jax.Array | Dynamic | None


def is_static(multiplier: Multiplier) -> TypeGuard[float | None]:
    """Whether it is known when rules are compiled: a number, or frozen."""
    return multiplier is None or isinstance(multiplier, float)


def is_array(multiplier: Any) -> TypeGuard[jax.Array]:
    """Whether it is a value that may be known at run time only."""
    return isinstance(multiplier, jax.Array)


def is_schedule(multiplier: Any) -> TypeGuard[Schedule]:
    """Whether it is a function of the step."""
    return (
        callable(multiplier)
        and not isinstance(multiplier, type)
        and not hasattr(multiplier, "shape")
    )


def read_multiplier(value: Any) -> Multiplier:
    """Check a multiplier; zeros become None, and numbers become floats.

    Raises:
        MultiplierError: with the cause alone.
    """
    if value is None or isinstance(value, Dynamic):
        return value
    if is_array(value):
        return _read_array(value)
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, bool | np.bool_):
        raise MultiplierError(
            f"{value!r} is no multiplier; write 1 for what trains at the full rate, or None for "
            "what is frozen"
        )
    if not isinstance(value, numbers.Real):
        if is_schedule(value):
            return _read_schedule(value)
        raise MultiplierError(_wrong(value))
    try:
        number = float(value)
    except OverflowError:
        raise MultiplierError(f"{show(value)} is too large for a float") from None
    if not math.isfinite(number):
        raise MultiplierError(
            f"{show(value)} is not finite; write a finite number, or None for what is frozen"
        )
    if number == 0 and value != 0:
        raise MultiplierError(f"{show(value)} is too small for a float; write None for frozen")
    return number or None


def _read_array(value: jax.Array) -> jax.Array:
    real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    if value.ndim == 0 and real:
        return value
    seen = f"an array {spec(value.shape, value.dtype)}"
    remedy = "write an array of one real number, of shape ()"
    if value.ndim:
        remedy = "a rule gives one multiplier; write one rule for each part, as with lrmult.along"
    raise MultiplierError(f"a multiplier is one real number or None, not {seen}; {remedy}")


def _read_schedule(value: Schedule) -> Schedule:
    try:
        inspect.signature(value).bind(0)
    except TypeError:
        raise MultiplierError(
            f"{show(value)} is no schedule: it cannot be called with the step alone; write a "
            "function step -> multiplier"
        ) from None
    except ValueError:  # some callables of C have no signature
        pass
    return value


def _wrong(value: Any) -> str:
    shown = show(value)
    if not shown.startswith(("an ", "the ")):
        shown = f"{shown} ({type(value).__name__})"
    seen = f"a multiplier is one number or None, not {shown}"
    if isinstance(value, str):
        try:
            if math.isfinite(float(value)):
                return f"{seen}; write {float(value)!r}, without quotes"
        except ValueError:
            pass
        return f"{seen}; write None for what is frozen, or a finite number such as 0.1"
    if isinstance(value, numbers.Complex):
        return f"{seen}; write its real part"
    if getattr(value, "shape", None) == ():
        return f"{seen}; write float(...) of it"
    return f"{seen}; write a number such as 0.1, or None for what is frozen"


def show_multiplier(multiplier: Any) -> str:
    """A multiplier in a message or a table: ``frozen``, a number, or what it is."""
    if multiplier is None:
        return "frozen"
    if isinstance(multiplier, float):
        return f"{multiplier:.12g}"
    if isinstance(multiplier, Dynamic):
        return multiplier.text
    if is_array(multiplier):
        return f"run-time {spec(multiplier.shape, multiplier.dtype)}"
    if isinstance(multiplier, During):
        return str(multiplier)
    if is_schedule(multiplier):
        name = getattr(multiplier, "__qualname__", type(multiplier).__name__)
        return f"schedule {name.replace('.<locals>', '').removesuffix('.<lambda>')}"
    return show(multiplier)
