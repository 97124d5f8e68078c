"""What rules cost in an update, beside plain adamw and beside other ways to say the same.

The ways, each with ``optax.adamw``:

* ``plain``: adamw alone, the floor of all ratios;
* ``rules``: ``optax.chain(adamw, lrmult.scale_by_rules(rules))``;
* ``wrap``: `lrmult.wrap`, where something is frozen;
* ``by hand``: a transformation with a list of multipliers, one for each leaf;
* ``partition``: `optax.partition` with one adamw for each multiplier;
* ``masked``: one `optax.masked` for each rule, chained, as big_vision does;
* ``selective``: `optax.selective_transform`, for what is frozen.

The figures, as ratios of paired, interleaved runs: tracing and lowering (in time of the process),
compiling, a step through ``jit`` (update and apply), an eager update; and the count of HLO
instructions and the bytes of the state. One program takes some percent longer than the same one
compiled earlier, which tells where arrays are small: there each way is built twice, in some order
and in the opposite one (not with ``--quick``).

The bounds are for float32, 300 leaves and 24 multipliers: as many instructions as plain adamw, a
step at most 1.03, tracing and lowering at most 1.10, an eager update at most 1.10; and a step of
``partition`` takes at least 2.5 times as long.

Run with ``python -m benchmarks.updates``; exits with 1 if a bound is missed. Times are to be
believed on a quiet machine only.
"""

import argparse
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import lrmult as lm
from benchmarks.timing import Ratio, paired, ratio_of, ratios, seconds

STEP, LOWER, EAGER, PARTITION = 1.03, 1.10, 1.10, 2.5


class Case(NamedTuple):
    """Leaves, what is said about them, and which ways can say it."""

    leaves: int
    size: int
    multipliers: int
    kind: str = "numbers"


CASES = {
    "300 leaves, 24 multipliers": Case(300, 1000, 24),
    "300 leaves, 5 multipliers": Case(300, 1000, 5),
    "3,000 leaves, 24 multipliers": Case(3000, 100, 24),
    "20 leaves of 4M, 5 multipliers": Case(20, 1 << 22, 5),
    "20 leaves of 4M, 20 multipliers": Case(20, 1 << 22, 20),
    "300 leaves, half frozen": Case(300, 1000, 5, "frozen"),
    "300 leaves, 24 schedules": Case(300, 1000, 24, "schedules"),
    "300 leaves, a part of each": Case(300, 1000, 5, "parts"),
}
QUICK = ("300 leaves, 24 multipliers",)
QUICK_WAYS = "plain", "rules", "partition"


def parameters(case: Case) -> dict[str, Any]:
    """Layers of arrays."""
    shape = (case.size // 10, 10)
    return {f"layer_{i}": {"w": jnp.full(shape, 0.5)} for i in range(case.leaves)}


def values(case: Case) -> list[float | None]:
    """The multiplier of each leaf: frozen ones first, then one for as many leaves as another."""
    numbers: list[float | None] = [0.5 + i / 10 for i in range(case.multipliers)]
    given = [numbers[i * case.multipliers // case.leaves] for i in range(case.leaves)]
    if case.kind == "frozen":
        given[: case.leaves // 2] = [None] * (case.leaves // 2)
    return given


def rules_of(case: Case) -> list[Any]:
    """The rules that say so."""
    given = values(case)
    rules: list[Any] = []
    for value in dict.fromkeys(given):
        first, count = given.index(value), given.count(value)
        target: Any = f"layer[{first}:{first + count}]"
        if case.kind == "parts":
            target = lm.along(target, 1, slice(0, 5))
        multiplier: Any = value
        if case.kind == "schedules" and value is not None:
            multiplier = optax.linear_schedule(value, 2 * value, 1000)
        rules.append((target, multiplier))
    return rules


def by_hand(given: list[float | None]) -> optax.GradientTransformation:
    """A list of multipliers, one for each leaf."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        scaled = [
            jnp.zeros_like(leaf) if value is None else leaf * value
            for leaf, value in zip(leaves, given, strict=True)
        ]
        return treedef.unflatten(scaled), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def in_order(params: Any, given: list[float | None]) -> list[Any]:
    """What is given for each layer, in the order of leaves, which is that of the texts."""
    return [given[int(name.removeprefix("layer_"))] for name in sorted(params)]


def ways_of(case: Case, params: Any) -> dict[str, optax.GradientTransformation]:
    """The ways to say the same."""
    rate, rules = 1e-3, lm.Rules(rules_of(case))
    plain = optax.adamw(rate)
    ways = {"plain": plain, "rules": optax.chain(plain, lm.scale_by_rules(rules))}
    if case.kind == "frozen":
        ways["wrap"] = lm.wrap(plain, rules)
    if case.kind in ("schedules", "parts"):
        return ways
    given = in_order(params, values(case))
    treedef = jax.tree.structure(params)
    labels = treedef.unflatten(["frozen" if value is None else str(value) for value in given])
    each = {
        str(value): optax.adamw(rate * value) for value in dict.fromkeys(given) if value is not None
    }
    ways["by hand"] = optax.chain(plain, by_hand(given))
    ways["partition"] = optax.partition({**each, "frozen": optax.set_to_zero()}, labels)
    ways["masked"] = optax.chain(
        plain,
        *[
            optax.masked(
                optax.set_to_zero() if value is None else optax.scale(value),
                treedef.unflatten([one == value for one in given]),
            )
            for value in dict.fromkeys(given)
        ],
    )
    if case.kind == "frozen":
        frozen = treedef.unflatten([value is None for value in given])
        trained = by_hand([value for value in given if value is not None])
        ways["selective"] = optax.selective_transform(
            optax.chain(plain, trained), freeze_mask=frozen
        )
    return ways


def instructions(compiled: Any) -> int:
    """How many instructions a compiled program has."""
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", compiled.as_text(), re.MULTILINE))


class Way:
    """One way to update: its step as it is lowered, compiled and run."""

    def __init__(self, tx: optax.GradientTransformation, params: Any) -> None:
        self.tx, self.params = tx, params
        self.state = tx.init(params)
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        self._step = jax.jit(self._update)
        self.step()

    def _update(self, grads: Any, state: Any, params: Any) -> Any:
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def lower(self) -> Any:
        """Trace and lower the step anew."""
        arguments = self.params, self.state, self.params
        return jax.jit(lambda *args: self._update(*args)).lower(*arguments)

    def step(self) -> Any:
        """A step through ``jit``."""
        return self._step(self.params, self.state, self.params)

    def eager(self) -> Any:
        """An eager update."""
        return self.tx.update(self.params, self.state, self.params)


def measure(name: str, options: Any) -> list[dict[str, Any]]:
    """The figures of a case, a row for each way."""
    case = CASES[name]
    params = parameters(case)
    given = ways_of(case, params)
    if options.quick:
        given = {way: given[way] for way in QUICK_WAYS}
    small = case.leaves * case.size < 1 << 22
    few = max(options.pairs // 8, 3)
    ways = {way: Way(tx, params) for way, tx in given.items()}
    steps = paired(of(ways, "step"), "plain", options.pairs)
    if small and not options.quick:
        again = {way: Way(given[way], params) for way in reversed(given)}
        for way, values in paired(of(again, "step"), "plain", options.pairs).items():
            steps[way] += values
    figures = {
        "step": {way: ratio_of(values) for way, values in steps.items()},
        "lower": ratios(of(ways, "lower"), "plain", few, time.process_time),
    }
    if not options.quick:
        figures["compile"] = compile_ratios(ways, 3)
    if case.leaves <= 300:
        figures["eager"] = ratios(of(ways, "eager"), "plain", options.pairs // 2)
    count = {way: instructions(each.lower().compile()) for way, each in ways.items()}
    return [
        {
            "case": name,
            "way": way,
            "state": each.bytes / ways["plain"].bytes,
            "instructions": count[way] / count["plain"],
            **{figure: found[way] for figure, found in figures.items()},
        }
        for way, each in ways.items()
    ]


def of(ways: dict[str, Way], what: str) -> dict[str, Callable[[], Any]]:
    """A method of each way."""
    return {name: getattr(way, what) for name, way in ways.items()}


def compile_ratios(ways: dict[str, Way], pairs: int) -> dict[str, Ratio]:
    """The time to compile what has been lowered."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(pairs):
        took = {}
        for name, way in ways.items():
            lowered = way.lower()
            took[name] = seconds(lambda lowered=lowered: lowered.compile() and None)
        for name, values in found.items():
            values.append(took[name] / took["plain"])
    return {name: ratio_of(values) for name, values in found.items()}


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The bounds that are missed."""
    found = {(row["case"], row["way"]): row for row in rows}
    name = "300 leaves, 24 multipliers"
    rules, partition = found.get((name, "rules")), found.get((name, "partition"))
    if rules is None or partition is None:
        return []
    bounds = {
        f"as many instructions: {rules['instructions']:.3f}": rules["instructions"] == 1,
        f"a step: {rules['step'].median:.3f}": rules["step"].median <= STEP,
        f"lowering: {rules['lower'].median:.3f}": rules["lower"].median <= LOWER,
        f"an eager update: {rules['eager'].median:.3f}": rules["eager"].median <= EAGER,
        f"partition: {partition['step'].median / rules['step'].median:.2f}": (
            partition["step"].median >= PARTITION * rules["step"].median
        ),
    }
    return [f"{name}, {bound}" for bound, holds in bounds.items() if not holds]


def table(rows: list[dict[str, Any]]) -> Table:
    """All figures."""
    shown = Table(title="over plain adamw")
    for column in ("case", "way", "state", "HLO", "step", "lower", "compile", "eager"):
        shown.add_column(column, justify="left" if column in ("case", "way") else "right")
    for row in rows:
        cells = [f"{row['state']:.3f}", f"{row['instructions']:.3f}"]
        cells += [str(row.get(name, "")) for name in ("step", "lower", "compile", "eager")]
        shown.add_row("" if row["way"] != "plain" else row["case"], row["way"], *cells)
    return shown


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE")
    parser.add_argument("--quick", action="store_true", help="one case, few ways, and fewer runs")
    parser.add_argument(
        "--pairs", type=int, help="of steps (80; quick: 40), and half as many of eager updates"
    )
    parser.add_argument("--json", metavar="FILE", help="where all figures are kept")
    options = parser.parse_args()
    options.pairs = options.pairs or (40 if options.quick else 80)
    names = options.only or (QUICK if options.quick else CASES)
    rows = [row for name in names for row in measure(name, options)]
    Console(width=160).print(table(rows))
    failures = missed(rows)
    for what in failures:
        print(f"missed: {what}")
    if options.json:
        plain = [
            {name: v._asdict() if isinstance(v, Ratio) else v for name, v in row.items()}
            for row in rows
        ]
        found = {"rows": plain, "missed": failures}
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
