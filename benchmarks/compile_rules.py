"""What compiling rules costs, beside what JAX needs to list the paths of the same tree.

Each figure is the median ratio of paired, interleaved runs on new rules, of which nothing is kept
from the run before:

* compiling 5, 30 and 200 globs against 10,000 leaves, over `tree_flatten_with_path` plus `keystr`
  of every path: at most 1.5, for trees of several libraries;
* that and reading `Plan.multipliers`, over the same;
* the time for each leaf at 100,000 leaves, over that at 10,000: at most 1.5, for linear;
* a mask tree for each of 200 rules, made with a regular expression as big_vision does, over
  compiling the rules: at least 50.

Run with ``python -m benchmarks.compile_rules``; exits with 1 if a bound is missed.
"""

import argparse
import gc
import json
import pathlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

import lrmult as lm
from lrmult._patterns import parse

COUNTS = (5, 30, 200)
LEAVES = 10_000
MANY = 100_000
LISTING = "compile_rules over listing the paths"
READING = "compile_rules(...).multipliers over listing the paths"
GROWTH = f"each of {MANY:,} leaves over each of {LEAVES:,}"
MASKS = "mask trees over compile_rules"
AT_MOST = {LISTING: 1.5, GROWTH: 1.5}
AT_LEAST = {MASKS: 50.0}

MATRIX = jax.ShapeDtypeStruct((64, 64), jnp.float32)
VECTOR = jax.ShapeDtypeStruct((64,), jnp.float32)
LETTERS = "abcdefghij"


def block() -> dict[str, Any]:
    """A block of a transformer: 20 leaves."""

    def dense() -> dict[str, Any]:
        return {"kernel": MATRIX, "bias": VECTOR}

    def norm() -> dict[str, Any]:
        return {"scale": VECTOR, "bias": VECTOR}

    return {
        "attn": {name: dense() for name in ("query", "key", "value", "out")},
        "mlp": {"fc1": dense(), "fc2": dense()},
        "ln1": norm(),
        "ln2": norm(),
        "gate": {"router": dense(), "experts": dense()},
    }


def transformer(leaves: int) -> Any:
    """Dicts in dicts, as Linen has them."""
    return {"params": {f"block_{i}": block() for i in range(leaves // 20)}}


def lists(leaves: int) -> Any:
    """The blocks in a list."""
    return {"params": {"blocks": [block() for _ in range(leaves // 20)]}}


def wide(leaves: int) -> Any:
    """One level of as many different names as there are leaves: nothing to share between them."""
    return {f"{LETTERS[i % 10]}_{i}_weight": VECTOR for i in range(leaves)}


def state(leaves: int) -> Any:
    """A state of NNX: every array in a variable."""
    return nnx.State(jax.tree.map(nnx.Param, transformer(leaves)))


class Dense(eqx.Module):
    """A layer of two arrays."""

    kernel: Any
    bias: Any


class Norm(eqx.Module):
    """A layer of two vectors."""

    scale: Any
    bias: Any


class Part(eqx.Module):
    """Layers by name."""

    held: dict[str, Any]


def modules(leaves: int) -> Any:
    """Modules of Equinox in a list."""

    def module(node: Any) -> Any:
        if "kernel" in node:
            return Dense(**node)
        if "scale" in node:
            return Norm(**node)
        return Part({name: module(child) for name, child in node.items()})

    return {"params": {"blocks": [module(block()) for _ in range(leaves // 20)]}}


def block_rules(count: int, blocks: int, name: str = "block_{i}") -> list[tuple[Any, float]]:
    """Globs of every kind, none of which matches nothing or is shadowed by the others."""
    kinds = (
        f"params/{name}/**/kernel",
        f"**/{name}/**/bias",
        f"*/{name}/**/{{{{query,key}}}}/*",
        f"**/{name}/**/fc*/*",
        f"**/{name}/**/ln*/scale",
    )
    step = max(1, blocks // count)
    rules = [(kinds[i % 5].format(i=i * step), 1.0 + i) for i in range(count - 1)]
    return [*rules, (..., 0.5)]


def list_rules(count: int, blocks: int) -> list[tuple[Any, float]]:
    """The same for blocks in a list."""
    return block_rules(count, blocks, "blocks/{i}")


def wide_rules(count: int, _: int) -> list[tuple[Any, float]]:
    """Globs with a fixed beginning, a fixed end, and neither."""
    kinds = ("{a}_{i}_*", "*_{i}_weight", "{a}_{i}_*w*t", "*{a}_{i}_w*")
    rules = [(kinds[i % 4].format(i=i, a=LETTERS[i % 10]), 1.0 + i) for i in range(count - 1)]
    return [*rules, (..., 0.5)]


TREES: dict[str, tuple[Callable[[int], Any], Callable[[int, int], list[tuple[Any, float]]]]] = {
    "transformer": (transformer, block_rules),
    "lists": (lists, list_rules),
    "wide": (wide, wide_rules),
    "nnx.State": (state, block_rules),
    "equinox": (modules, list_rules),
}


def list_paths(tree: Any) -> list[str]:
    """What JAX offers: every path as text."""
    return [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def compiled(rules: list[tuple[Any, float]], tree: Any) -> lm.Plan:
    """The plan, from rules that have never been read."""
    parse.cache_clear()
    return lm.compile_rules(rules, tree)


def mask_trees(rules: list[tuple[Any, float]], tree: Any) -> list[Any]:
    """A mask tree for each rule: each regular expression over the name of each leaf."""
    patterns = [re.compile(_regex(target)) for target, _ in rules]

    def first_match(path: Any, _: Any) -> tuple[bool, ...]:
        name = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        matches = [pattern.fullmatch(name) is not None for pattern in patterns]
        return tuple(match and not any(matches[:i]) for i, match in enumerate(matches))

    matches = jax.tree_util.tree_map_with_path(first_match, tree)
    return [
        jax.tree.map(lambda _, found, i=i: found[i], tree, matches) for i in range(len(patterns))
    ]


def _regex(target: Any) -> str:
    """The regular expression that a glob stands for; it need not be exact to take its time."""
    if target is ...:
        return ".*"
    text = re.escape(target).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return text.replace(r"\{", "(").replace(r"\}", ")").replace(",", "|") + "(/.*)?"


def seconds(run: Callable[[], Any]) -> float:
    """The time of one run, garbage collected beforehand."""
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(run: Callable[[], Any], base: Callable[[], Any], pairs: int) -> list[float]:
    """Ratios of paired runs, in alternating order."""
    found = []
    for i in range(pairs + 1):
        if i % 2:
            a, b = seconds(run), seconds(base)
        else:
            b, a = seconds(base), seconds(run)
        found.append(a / b)
    return sorted(found[1:])


def figures(name: str, counts: list[int], pairs: int, few: int) -> dict[str, list[float]]:
    """All ratios for a tree, by what they say."""
    make, make_rules = TREES[name]
    tree, large = make(LEAVES), make(MANY)
    found = {}
    for count in counts:
        rules, more = make_rules(count, LEAVES // 20), make_rules(count, MANY // 20)

        def run(rules: list[Any] = rules) -> Any:
            return compiled(rules, tree)

        found[f"{count} rules, {LEAVES:,} leaves: {LISTING}"] = ratios(
            run, lambda: list_paths(tree), pairs
        )
        found[f"{count} rules, {LEAVES:,} leaves: {READING}"] = ratios(
            lambda run=run: run().multipliers, lambda: list_paths(tree), pairs
        )
        found[f"{count} rules, {MANY:,} leaves: {LISTING}"] = ratios(
            lambda more=more: compiled(more, large), lambda: list_paths(large), few
        )
        growth = ratios(lambda more=more: compiled(more, large), run, few)
        found[f"{count} rules: {GROWTH}"] = [ratio * LEAVES / MANY for ratio in growth]
    found[f"{count} rules, {LEAVES:,} leaves: {MASKS}"] = ratios(
        lambda: mask_trees(rules, tree), run, 2
    )
    return found


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15, help="runs of each figure")
    parser.add_argument("--few", type=int, default=5, help=f"runs of those of {MANY:,} leaves")
    parser.add_argument("--rules", nargs="+", type=int, default=[*COUNTS], help="how many")
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--json", metavar="FILE", help="where to write the ratios")
    options = parser.parse_args()
    report: dict[str, dict[str, float]] = {}
    missed = False
    for tree in options.trees:
        for figure, found in figures(tree, options.rules, options.pairs, options.few).items():
            median = statistics.median(found)
            kind = figure.rpartition(": ")[2]
            most, least = AT_MOST.get(kind), AT_LEAST.get(kind)
            missed |= (most is not None and median > most) or (least is not None and median < least)
            report[f"{tree}, {figure}"] = {"median": median, "min": found[0], "max": found[-1]}
            bound = f"; at most {most:g}" if most else f"; at least {least:g}" if least else ""
            print(
                f"{tree}, {figure}: {median:.2f} ({found[0]:.2f} to {found[-1]:.2f}{bound})",
                flush=True,
            )
    if options.json:
        result = {"jax": jax.__version__, "python": platform.python_version(), "ratios": report}
        pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
