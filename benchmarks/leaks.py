"""Does compiling rules for ever other trees keep memory flat?

Rules are compiled against trees no two of which are alike, through `compile_rules`, an eager
`scale_by_rules(...).update` and `wrap(...).init`. All caches are bounded: once they are full,
neither the memory of the process nor the number of live objects grows.

    python -m benchmarks.leaks                 # 10,000 trees
    python -m benchmarks.leaks --trees 600

Exits with 1 if either has grown by more than a tenth from the first third to the end.
"""

import argparse
import gc
import pathlib
from typing import NamedTuple

import numpy as np
import optax

import lrmult as lm


class Use(NamedTuple):
    """What a process holds."""

    megabytes: float
    objects: int


def use() -> Use:
    """What this process holds after all garbage is collected."""
    gc.collect()
    status = pathlib.Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return Use(int(line.split()[1]) / 1024, len(gc.get_objects()))


def compile_once(number: int) -> None:
    """Compile rules against a tree unlike all others, in every way."""
    tree = {
        f"layer_{number}_{i}": {"kernel": np.ones((3, 2)), "bias": np.ones(2)} for i in range(10)
    }
    rules = lm.Rules(
        [(f"layer_{number}_0", None), (lm.neurons(f"layer_{number}_1", 0), None), ("**/bias", 0.5)]
    )
    lm.compile_rules(rules, tree)
    tx = lm.scale_by_rules([*rules, (..., 2.0)])
    tx.update(tree, tx.init(tree), tree)
    lm.wrap(optax.identity(), rules, compact=number % 2 == 0).init(tree)


def growth(trees: int) -> tuple[Use, Use]:
    """What the process holds after a third of the trees, and after all of them."""
    for number in range(trees // 3):
        compile_once(number)
    first = use()
    for number in range(trees // 3, trees):
        compile_once(number)
    return first, use()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trees", type=int, default=10_000)
    options = parser.parse_args()
    first, last = growth(options.trees)
    print(
        f"after {options.trees // 3:,} trees: {first.megabytes:.0f} MB, {first.objects:,} objects"
    )
    print(f"after {options.trees:,} trees: {last.megabytes:.0f} MB, {last.objects:,} objects")
    if any(end > 1.1 * start for start, end in zip(first, last, strict=True)):
        raise SystemExit("it grows")


if __name__ == "__main__":
    main()
