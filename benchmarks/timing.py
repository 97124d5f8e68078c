"""Ratios of paired, interleaved runs."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Ratio(NamedTuple):
    """The median of ratios, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def seconds(run: Callable[[], Any], times: int = 1) -> float:
    """The time that some runs take, to the end of their computations."""
    start = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(run())
    return time.perf_counter() - start


def ratios(
    runs: Mapping[str, Callable[[], Any]], base: str, pairs: int, times: int = 1
) -> dict[str, Ratio]:
    """The time of each run over that of one of them.

    They take turns, in an order that is turned round each time. The first two rounds do not count.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(pairs + 2):
        order = list(runs) if turn % 2 else list(reversed(runs))
        took = {name: seconds(runs[name], times) for name in order}
        for name, values in found.items():
            values.append(took[name] / took[base])
    return {name: ratio_of(values[2:]) for name, values in found.items()}


def ratio_of(values: list[float]) -> Ratio:
    """The median and the quartiles of some ratios."""
    if len(values) < 2:
        return Ratio(*values * 3)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(statistics.median(values), low, high)
