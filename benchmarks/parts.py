"""What parts of arrays and schedules cost, beside adamw without rules.

Each figure is the median ratio of paired, interleaved runs; what the host does to trace, lower and
compile is taken in its own time (CPU seconds), which neighbours disturb less:

* columns: the jitted adamw step of a matrix with a tenth of its columns frozen takes at most 1.15
  times as long to compile (traced, lowered and compiled, with empty caches) and at most 1.05 times
  as long to run;
* mask: with half of its elements frozen by an arbitrary mask the step takes at most 1.15 times as
  long to run, and the state grows by at most one bit per element;
* schedules: to trace and lower the step of 24 blocks of 12 arrays, with a schedule for each block,
  takes at most 1.3 times as long;
* host, for information: eager updates with parts and schedules, and `init` with the mask.

Nor may a constant above 64 KiB stand in a lowered program. Run with ``python benchmarks/parts.py``,
or a part of it quickly with ``--only columns --rows 512 --pairs 9``; exits with 1 if a bound is
missed. Times are to be believed on a quiet machine only.
"""

import argparse
import gc
import json
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lrmult as lm

LARGEST_CONSTANT = 2**16
BLOCKS, ARRAYS = 24, 12

_CONSTANT = re.compile(
    r"stablehlo\.constant dense(_resource)?<(.)[^\n]*> : tensor<((?:\d+x)*)(complex<)?[a-z]+(\d+)"
)


class Report:
    """Prints figures as they come, keeps them, and knows whether one missed its bound."""

    def __init__(self) -> None:
        self.missed = False
        self.figures: dict[str, dict[str, Any]] = {}

    def ratios(self, what: str, found: list[float], bound: float | None = None) -> None:
        """The median of ratios, with their quartiles."""
        found = sorted(found)
        quarter = len(found) // 4
        spread = f"quartiles {found[quarter]:.3f} to {found[-quarter - 1]:.3f}"
        self.figure(what, statistics.median(found), bound, spread)

    def figure(self, what: str, value: float, bound: float | None = None, more: str = "") -> None:
        """One figure, and at most what it may be."""
        self.missed |= bound is not None and value > bound
        self.figures[what] = {"value": value, "spread": more, "bound": bound}
        limit = "" if bound is None else f"at most {bound:g}"
        notes = "; ".join(note for note in (more, limit) if note)
        print(f"{what}: {value:.6g}" + (f" ({notes})" if notes else ""), flush=True)


def largest_constant(text: str) -> int:
    """The bytes of the largest constant of a lowered program; a repeated value costs nothing."""
    sizes = [0]
    for resource, first, shape, is_complex, bits in _CONSTANT.findall(text):
        if resource or first in '["':
            count = np.prod([int(size) for size in shape.split("x")[:-1]], dtype=int)
            sizes.append(int(count) * max(int(bits) // 8, 1) * (2 if is_complex else 1))
    return max(sizes)


def seconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """The time of one run, to the end of its computation, garbage collected beforehand."""
    gc.collect()
    start = clock()
    jax.block_until_ready(run())
    return clock() - start


def ratios(
    run: Callable[[], Any],
    base: Callable[[], Any],
    pairs: int,
    before: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Ratios of paired runs in alternating order, two warming pairs left out."""
    found = []
    for i in range(pairs + 2):
        times = {}
        for which in (run, base) if i % 2 else (base, run):
            before()
            times[which] = seconds(which, clock)
        found.append(times[run] / times[base])
    return found[2:]


def step_of(tx: Any) -> Any:
    """A jitted step that overwrites the parameters and the state."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def with_rules(rules: Any) -> Any:
    """An adamw with rules."""
    return optax.chain(optax.adamw(1e-3), lm.scale_by_rules(rules))


def lower(tx: Any, params: Any) -> Any:
    """The step, traced and lowered."""
    return step_of(tx).lower(params, jax.eval_shape(tx.init, params), params)


def running(tx: Any, shape: tuple[int, int]) -> Callable[[], Any]:
    """A function that takes one step with a matrix; each call goes on from the last."""
    grads = {"w": jnp.full(shape, 0.01)}
    kept = [{"w": jnp.full(shape, 0.5)}, tx.init(grads)]
    step = step_of(tx)

    def run() -> Any:
        kept[:] = step(*kept, grads)
        return kept[0]

    return run


def matrix(
    report: Report, name: str, rules: Any, options: Any, compiling: float | None, stepping: float
) -> None:
    """The figures of the step of one matrix with a part of it frozen."""
    shape = options.rows, options.columns
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    plain, ruled = optax.adamw(1e-3), with_rules(rules)
    lowered = lower(ruled, params)
    constant = largest_constant(lowered.as_text())
    report.figure(f"{name}, largest constant in bytes", constant, LARGEST_CONSTANT)
    size = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        for state in (jax.eval_shape(tx.init, params) for tx in (plain, ruled))
    ]
    grown = size[1] - size[0]
    if grown:
        grown -= 4  # the number of steps
    report.figure(f"{name}, more state in bytes per element", grown / params["w"].size, 1 / 8)
    found = ratios(
        lambda: lower(ruled, params).compile(),
        lambda: lower(plain, params).compile(),
        2 * options.pairs,
        jax.clear_caches,
        time.process_time,
    )
    report.ratios(f"{name}, compiling", found, compiling)
    found = ratios(running(ruled, shape), running(plain, shape), options.pairs)
    report.ratios(f"{name}, stepping", found, stepping)


def columns(report: Report, options: Any) -> None:
    """A tenth of the columns is frozen."""
    chosen = np.random.default_rng(0).permutation(options.columns)[: options.columns // 10]
    rules = [(lm.along("w", 1, chosen.tolist()), None)]
    matrix(report, "columns", rules, options, compiling=1.15, stepping=1.05)


def arbitrary(options: Any) -> Any:
    """A mask of half of the elements that is no outer product of vectors."""
    random = np.random.default_rng(0)
    return random.integers(0, 2, (options.rows, options.columns), dtype=np.uint8).view(bool)


def mask(report: Report, options: Any) -> None:
    """Half of the elements are frozen."""
    rules = [(lm.elements("w", arbitrary(options)), None)]
    matrix(report, "mask", rules, options, compiling=None, stepping=1.15)


def blocks() -> Any:
    """Small arrays, as many in each block."""
    arrays = {f"w{i}": jnp.full((16, 16), 0.5) for i in range(ARRAYS)}
    return {f"block_{i}": dict(arrays) for i in range(BLOCKS)}


def warmups() -> list[Any]:
    """A rule with a schedule of its own for each block."""
    return [
        (f"block_{i}", optax.linear_schedule(0.0, 1.0 + i / 10, 100 + i)) for i in range(BLOCKS)
    ]


def schedules(report: Report, options: Any) -> None:
    """Each block has a schedule."""
    params = blocks()
    plain, ruled = optax.adamw(1e-3), with_rules(warmups())
    found = ratios(
        lambda: lower(ruled, params),
        lambda: lower(plain, params),
        max(options.pairs, 15),
        jax.clear_caches,
        time.process_time,
    )
    report.ratios("schedules, tracing and lowering", found, 1.3)
    constant = largest_constant(lower(ruled, params).as_text())
    report.figure("schedules, largest constant in bytes", constant, LARGEST_CONSTANT)


def host(report: Report, options: Any) -> None:
    """Eager updates, and the time of `init` with the mask, for information."""
    params = blocks()
    frozen = [(lm.along(f"block_{i}", 1, [i % 16, 3]), None) for i in range(BLOCKS)]
    plain = optax.adamw(1e-3)
    for name, rules in (("columns", frozen), ("schedules", warmups())):
        ruled = with_rules(rules)
        states = plain.init(params), ruled.init(params)
        found = ratios(
            lambda tx=ruled, state=states[1]: tx.update(params, state, params),
            lambda state=states[0]: plain.update(params, state, params),
            options.pairs,
        )
        report.ratios(f"host, eager update of {BLOCKS * ARRAYS} arrays with {name}", found)
    params = {"w": jax.ShapeDtypeStruct((options.rows, options.columns), jnp.float32)}
    dense = arbitrary(options)
    reading, first, again = [], [], []
    for i in range(3):
        dense[0, i] ^= True  # plans are cached
        start = time.perf_counter()
        tx = lm.scale_by_rules([(lm.elements("w", dense), None)])
        reading.append(time.perf_counter() - start)
        first.append(seconds(lambda tx=tx: tx.init(params)))
        again.append(seconds(lambda tx=tx: tx.init(params)))
    for what, times in (
        ("reading", reading),
        ("first init with", first),
        ("later init with", again),
    ):
        report.figure(f"host, {what} the mask in seconds", statistics.median(times))


PARTS = {"columns": columns, "mask": mask, "schedules": schedules, "host": host}


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--pairs", type=int, default=21, help="schedules take 15 at least")
    parser.add_argument("--rows", type=int, default=4096, help="of the matrix")
    parser.add_argument("--columns", type=int, default=16384, help="of the matrix")
    parser.add_argument("--json", metavar="FILE", help="where all figures are kept")
    options = parser.parse_args()
    report = Report()
    for name in options.only:
        PARTS[name](report, options)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report.figures, indent=1))
    return int(report.missed)


if __name__ == "__main__":
    sys.exit(main())
