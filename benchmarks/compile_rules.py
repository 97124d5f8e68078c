"""What compiling rules costs, beside what JAX needs to list the paths of the same tree.

Two figures, each the median ratio of paired, interleaved runs:

* compiling 200 glob rules against 10,000 leaves, over `tree_flatten_with_path` plus `keystr` of
  every path: at most 3;
* compiling 200 glob rules over compiling 5 of them: at most 2.

Run with ``python benchmarks/compile_rules.py``; exits with 1 if a bound is missed.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lrmult as lm

BOUNDS = {"over listing the paths": 3.0, "200 rules over 5": 2.0}


def transformer(blocks: int = 500) -> Any:
    """A transformer of dicts: 20 leaves a block, 10,000 in all, shapes only."""
    matrix = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    vector = jax.ShapeDtypeStruct((64,), jnp.float32)
    dense = {"kernel": matrix, "bias": vector}
    norm = {"scale": vector, "bias": vector}
    attention = dict.fromkeys(("query", "key", "value", "out"), dense)
    block = {"attn": attention, "mlp": {"fc1": dense, "fc2": dense}, "ln1": norm, "ln2": norm}
    block["gate"] = {"router": dense, "experts": dense}
    return {"params": {f"block_{i}": block for i in range(blocks)}}


def wide(leaves: int = 10_000) -> Any:
    """One level of as many different names as there are leaves: nothing to share between them."""
    vector = jax.ShapeDtypeStruct((64,), jnp.float32)
    return {f"{'abcdefghij'[i % 10]}_{i}_weight": vector for i in range(leaves)}


def glob_rules(count: int, blocks: int = 500) -> list[tuple[str, float]]:
    """Globs of every kind, none of which matches nothing or is shadowed by the others."""
    kinds = (
        "params/block_{i}/*/*/kernel",
        "**/block_{i}/**/bias",
        "*/block_{i}/attn/{{query,key}}/*",
        "**/block_{i}/mlp/fc*/*",
        "**/*_{i}/ln*/scale",
    )
    step = max(1, blocks // count)
    return [(kinds[i % len(kinds)].format(i=i * step), 1.0 + i) for i in range(count)]


def wide_rules(count: int) -> list[tuple[str, float]]:
    """Globs with a fixed beginning, a fixed end, and neither."""
    kinds = ("{a}_{i}_*", "*_{i}_weight", "{a}_{i}_*w*t", "*{a}_{i}_w*")
    return [(kinds[i % 4].format(i=i, a="abcdefghij"[i % 10]), 1.0 + i) for i in range(count)]


def list_paths(tree: Any) -> list[str]:
    """What JAX offers: every path as text."""
    return [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def seconds(run: Callable[[], Any]) -> float:
    """The time of one run, garbage collected beforehand."""
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(run: Callable[[], Any], base: Callable[[], Any], pairs: int) -> list[float]:
    """Ratios of paired runs, in alternating order."""
    found = []
    for i in range(pairs + 2):
        if i % 2:
            a, b = seconds(run), seconds(base)
        else:
            b, a = seconds(base), seconds(run)
        found.append(a / b)
    return sorted(found[2:])


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report, missed = {}, False
    for name, tree, rules in (
        ("transformer", transformer(), glob_rules),
        ("wide", wide(), wide_rules),
    ):
        leaves = len(jax.tree.leaves(tree))
        few, many = lm.Rules(rules(5)), lm.Rules(rules(200))
        for figure, base in (
            ("over listing the paths", lambda tree=tree: list_paths(tree)),
            ("200 rules over 5", lambda tree=tree, few=few: lm.compile_rules(few, tree)),
        ):
            found = ratios(lambda t=tree, r=many: lm.compile_rules(r, t), base, options.pairs)
            median = statistics.median(found)
            missed |= median > BOUNDS[figure]
            report[f"{name}: {figure}"] = {"median": median, "min": found[0], "max": found[-1]}
            if not options.json:
                print(
                    f"{name} ({leaves:,} leaves, 200 globs), {figure}: {median:.2f} "
                    f"({found[0]:.2f} to {found[-1]:.2f}; at most {BOUNDS[figure]:g})"
                )
    if options.json:
        print(json.dumps({"jax": jax.__version__, "ratios": report}, indent=2))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
