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

    def inverse(self, of: float = 1) -> "Ratio":
        """What a speed comes to: so much over the ratio of times."""
        return Ratio(of / self.median, of / self.high, of / self.low)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def seconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """The time that a run takes, to the end of its computation."""
    start = clock()
    jax.block_until_ready(run())
    return clock() - start


def ratios(
    runs: Mapping[str, Callable[[], Any]],
    base: str,
    pairs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Ratio]:
    """The time of each run over that of one of them, from rounds in which each has its turn."""
    return {name: ratio_of(values) for name, values in paired(runs, base, pairs, clock).items()}


def paired(
    runs: Mapping[str, Callable[[], Any]],
    base: str,
    pairs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The ratio of each round; the order within a round is random, the first two do not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    order, chance = list(runs), random.Random(0)
    for _ in range(pairs + 2):
        chance.shuffle(order)
        took = {name: seconds(runs[name], clock) for name in order}
        for name, values in found.items():
            values.append(took[name] / took[base])
    return {name: values[2:] for name, values in found.items()}


def ratio_of(values: list[float]) -> Ratio:
    """The median and the quartiles of some ratios."""
    if len(values) < 2:
        return Ratio(*values * 3)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(statistics.median(values), low, high)
