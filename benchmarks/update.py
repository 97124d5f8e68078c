"""What rules cost in an update: eager adamw on 300 leaves with rules, over adamw without.

The figure is the median ratio of paired, interleaved runs: at most 1.10. Run with
``python benchmarks/update.py``; exits with 1 if the bound is missed.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lrmult as lm

BOUND = 1.10
MULTIPLIERS = 24


def parameters(leaves: int, size: int) -> Any:
    """Blocks of ten arrays."""
    return {
        f"block_{i}": {f"w{j}": jnp.full((size,), 0.5) for j in range(10)}
        for i in range(leaves // 10)
    }


def seconds(tx: Any, grads: Any, state: Any, params: Any) -> float:
    """The time of one eager update, to the end of its computation."""
    start = time.perf_counter()
    jax.block_until_ready(tx.update(grads, state, params))
    return time.perf_counter() - start


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--leaves", type=int, default=300)
    parser.add_argument("--size", type=int, default=1000)
    options = parser.parse_args()
    params = parameters(options.leaves, options.size)
    blocks = options.leaves // 10
    rules = [(f"block_{i}", 0.5 + i / 10) for i in range(min(MULTIPLIERS, blocks) - 1)]
    frozen = [(f"block_[{blocks // 2}:]", None), *rules[: blocks // 2]]
    missed = False
    for name, some in ((f"{len(rules)} multipliers", rules), ("half frozen", frozen)):
        plain = optax.adamw(1e-3)
        ruled = optax.chain(optax.adamw(1e-3), lm.scale_by_rules(some))
        states = plain.init(params), ruled.init(params)
        ratios = []
        for i in range(options.pairs + 3):
            pair = [(0, plain), (1, ruled)][:: 1 if i % 2 else -1]
            times = {which: seconds(tx, params, states[which], params) for which, tx in pair}
            ratios.append(times[1] / times[0])
        ratios = sorted(ratios[3:])
        median = statistics.median(ratios)
        missed |= median > BOUND
        quarter = len(ratios) // 4
        print(
            f"eager update, {options.leaves} leaves of {options.size}, {name}: {median:.3f} "
            f"(quartiles {ratios[quarter]:.3f} to {ratios[-quarter - 1]:.3f}; at most {BOUND:g})"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
