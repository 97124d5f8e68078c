"""The memory bandwidth of an update, beside that of a copy and of plain adamw.

An update of adamw reads the gradients, the parameters and two moments, and writes the last three:
seven arrays. What it achieves in bytes per second is compared with a copy, which reads one array
and writes one. ``lrmult.scale_by_rules`` after it and `lrmult.wrap` around it are held to 0.9 of
the bandwidth of adamw alone, in float32 and in bfloat16; of what is frozen under `wrap` nothing
needs to move, so there a quarter is frozen, and its bytes do not count.

Run with ``python -m benchmarks.bandwidth``, on an accelerator with its own memory for the default
of 1,000,000,000 parameters; exits with 1 if the bound is missed.
"""

import argparse
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import lrmult as lm
from benchmarks.timing import Ratio, ratios, seconds

SHARE = 0.9
LAYERS = 16


class Update:
    """An update whose parameters and state are overwritten, as in training."""

    def __init__(self, tx: optax.GradientTransformation, params: Any, moved: float) -> None:
        self.moved = moved  # the share of the parameters that an update moves
        self.grads = jax.tree.map(jnp.zeros_like, params)
        self.carried = jax.tree.map(jnp.copy, params), tx.init(params)

        def update(grads: Any, params: Any, state: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.run = jax.jit(update, donate_argnums=(1, 2))

    def __call__(self) -> Any:
        """One update."""
        self.carried = self.run(self.grads, *self.carried)
        return self.carried


class Copy:
    """Arrays that are read and overwritten."""

    def __init__(self, params: Any) -> None:
        self.carried = jax.tree.map(jnp.copy, params)
        self.run = jax.jit(lambda tree: jax.tree.map(lambda array: -array, tree), donate_argnums=0)

    def __call__(self) -> Any:
        """One copy, with the signs changed: XLA would leave out one that changes nothing."""
        self.carried = self.run(self.carried)
        return self.carried


def measure(dtype: Any, options: Any) -> list[dict[str, Any]]:
    """The figures for one dtype."""
    size = options.elements // LAYERS
    params = {f"layer_{i}": jnp.full((size,), 0.5, dtype) for i in range(LAYERS)}
    bytes_of = size * LAYERS * jnp.dtype(dtype).itemsize
    adamw = optax.adamw(1e-3)
    rules = [(f"layer[{i}]", 0.5 + i / 10) for i in range(LAYERS)]
    frozen = [(f"layer[:{LAYERS // 4}]", None), *rules[LAYERS // 4 :]]
    ways = {
        "adamw": Update(adamw, params, 1.0),
        "scale_by_rules": Update(optax.chain(adamw, lm.scale_by_rules(rules)), params, 1.0),
        "wrap, a quarter frozen": Update(lm.wrap(adamw, frozen), params, 0.75),
    }
    runs = {**ways, "copy": Copy(params)}
    of_adamw = ratios(runs, "adamw", options.pairs)
    of_copy = ratios(runs, "copy", options.pairs)
    took = min(seconds(runs["copy"]) for _ in range(options.pairs))
    return [
        {
            "dtype": str(jnp.dtype(dtype)),
            "way": name,
            "gigabytes_per_second": 7 * way.moved * bytes_of / took / of_copy[name].median / 1e9,
            "of_copy": of_copy[name].inverse(7 / 2 * way.moved)._asdict(),
            "of_adamw": of_adamw[name].inverse(way.moved)._asdict(),
        }
        for name, way in ways.items()
    ]


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--elements", type=int, help="1,000,000,000; on CPU 64,000,000")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="where all figures are kept")
    options = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    options.elements = options.elements or (64_000_000 if on_cpu else 1_000_000_000)
    rows = [row for dtype in (jnp.float32, jnp.bfloat16) for row in measure(dtype, options)]
    shown = Table(title=f"{options.elements:,} parameters on {jax.devices()[0].device_kind}")
    for column in ("dtype", "update", "GB/s", "of a copy", "of adamw"):
        shown.add_column(column, justify="left" if column in ("dtype", "update") else "right")
    for row in rows:
        speed = f"{row['gigabytes_per_second']:.2f}"
        shares = [str(Ratio(**row[name])) for name in ("of_copy", "of_adamw")]
        shown.add_row(row["dtype"], row["way"], speed, *shares)
    Console(width=100).print(shown)
    missed = [row for row in rows if row["of_adamw"]["median"] < SHARE]
    for row in missed:
        print(f"missed: {row['dtype']}, {row['way']}: {row['of_adamw']['median']:.2f} of adamw")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"rows": rows, "elements": options.elements}, file, indent=1)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
