"""Schedules that are data: they can be compared, printed, and written to a file."""

import dataclasses
import math
import numbers
from typing import Any

import jax.numpy as jnp

from lrmult._errors import MultiplierError, show


@dataclasses.dataclass(frozen=True)
class During:
    """A multiplier for some of the steps, and zero, which trains nothing, for all others.

    What a schedule freezes for a while costs as much as if it trained: it keeps its place in the
    state of the optimizer, whose moments move on, and nothing is compiled anew when it thaws.

    Attributes:
        multiplier: the multiplier in that time.
        start: the first step of it; steps count from 0.
        stop: the first step after it, or None.

    Raises:
        MultiplierError: if `start` and `stop` are no such steps, or the multiplier is no number.

    Example:
        >>> import lrmult as lm
        >>> thaw = lm.During(0.5, start=100)
        >>> [float(thaw(step)) for step in (0, 99, 100, 1000)]
        [0.0, 0.0, 0.5, 0.5]
        >>> lm.Rules([("trunk", thaw)])
        Rules([('trunk', During(0.5, start=100))])
    """

    multiplier: float
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        steps = {"start": self.start, "stop": 0 if self.stop is None else self.stop}
        for name, step in steps.items():
            is_step = isinstance(step, numbers.Integral) and not isinstance(step, bool)
            if not is_step or not 0 <= step < 2**31:
                raise MultiplierError(
                    f"{self!r}: {name} is {show(step)}; write a step, from 0 to below 2**31"
                )
        is_number = isinstance(self.multiplier, numbers.Real)
        if not is_number or isinstance(self.multiplier, bool) or not _is_usable(self.multiplier):
            raise MultiplierError(
                f"{self!r}: its multiplier is {show(self.multiplier)}; write a finite number other "
                "than 0"
            )
        if self.stop is not None and self.stop <= self.start:
            raise MultiplierError(f"{self!r} is over before it starts; write a later stop")
        read = {
            "multiplier": float(self.multiplier),
            "start": int(self.start),
            "stop": None if self.stop is None else int(self.stop),
        }
        for name, value in read.items():
            object.__setattr__(self, name, value)

    def __call__(self, step: Any) -> Any:
        """The multiplier at a step."""
        is_on = step >= self.start
        if self.stop is not None:
            is_on &= step < self.stop
        return jnp.where(is_on, self.multiplier, 0.0)

    def __repr__(self) -> str:
        start = f", start={self.start}" if self.start else ""
        stop = "" if self.stop is None else f", stop={self.stop}"
        return f"During({self.multiplier!r}{start}{stop})"

    def __str__(self) -> str:
        start = f" from step {self.start}" if self.start else ""
        stop = "" if self.stop is None else f" until step {self.stop}"
        return f"{self.multiplier:.12g}{start}{stop}"


def _is_usable(multiplier: Any) -> bool:
    try:
        return math.isfinite(multiplier) and float(multiplier) != 0
    except OverflowError:
        return False
