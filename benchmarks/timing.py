"""Ratios of paired, interleaved runs."""

import random
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
    """The time of each run over that of one of them, from rounds in which each has its turn."""
    return {name: ratio_of(values) for name, values in paired(runs, base, pairs, times).items()}


def paired(
    runs: Mapping[str, Callable[[], Any]], base: str, pairs: int, times: int = 1
) -> dict[str, list[float]]:
    """The ratio of each round; the order within a round is random, the first two do not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    order, chance = list(runs), random.Random(0)
    for _ in range(pairs + 2):
        chance.shuffle(order)
        took = {name: seconds(runs[name], times) for name in order}
        for name, values in found.items():
            values.append(took[name] / took[base])
    return {name: values[2:] for name, values in found.items()}


def ratio_of(values: list[float]) -> Ratio:
    """The median and the quartiles of some ratios."""
    if len(values) < 2:
        return Ratio(*values * 3)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(statistics.median(values), low, high)
