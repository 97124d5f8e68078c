"""What is gained by running the frozen front once: a linear probe on a frozen trunk.

The trunk is 95 % of the floating-point operations of a step, as XLA counts them, when it is frozen
and the step is one ``jit`` (the number of classes of the probe is chosen so). There are three
trunks: linear layers, convolutions and a transformer. Two ways to train the same weights:

* ``wrap``, the best way without a cache: the loss of the images, its gradient and the update by
  ``lrmult.wrap`` in one ``jit``;
* ``cached``: the same step with ``Precomputed.rest``, on what `lrmult.CachedFeatures` serves, from
  memory, from files, and from files in bfloat16.

An epoch is all batches in a new order, with parameters and state donated. The bounds: an epoch on
cached features takes at most 0.15 of the time (the median ratio of paired, interleaved epochs), a
step at most 0.06 of the operations, and the weights after an epoch differ by less than 1e-5.

Run with ``python benchmarks/precompute.py``; exits with 1 if a bound is missed. Times are to be
believed on a quiet machine only.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import lrmult as lm

TRUNK, TIME, FLOPS, SAME = 0.95, 0.15, 0.06, 1e-5
SIDE = 16  # of images


class Trunk(NamedTuple):
    """A trunk: its parameters, and a function of them and of images that returns features."""

    params: Any
    function: Callable[[Any, Any], Any]


def random(seed: int, *shape: int) -> Any:
    """Numbers of a size that keeps activations alive."""
    fan_in = max(int(np.prod(shape[:-1])), 1)
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return jnp.asarray(values * np.float32(np.sqrt(2 / fan_in)))


def linear_layers() -> Trunk:
    """Four linear layers."""
    widths = [SIDE * SIDE * 3, 2048, 2048, 2048, 512]
    params = [random(i, *pair) for i, pair in enumerate(itertools.pairwise(widths))]

    def function(params: Any, images: Any) -> Any:
        x = images.reshape(len(images), -1)
        for kernel in params:
            x = jax.nn.relu(x @ kernel)
        return x

    return Trunk(params, function)


def convolutions() -> Trunk:
    """Four convolutions, two of which halve the image, and the mean over it."""
    widths = [3, 32, 64, 64, 128]
    pairs = enumerate(itertools.pairwise(widths))
    params = [random(i, 3, 3, *pair) for i, pair in pairs]

    def function(params: Any, images: Any) -> Any:
        x = images
        for i, kernel in enumerate(params):
            stride = (2, 2) if i % 2 else (1, 1)
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=layout)
            x = jax.nn.relu(x)
        return x.mean((1, 2))

    return Trunk(params, function)


def transformer() -> Trunk:
    """Three blocks on patches of four by four, and the mean over them."""
    width, heads = 96, 4
    shapes = {"qkv": (width, 3 * width), "out": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    blocks = [
        {name: random(10 * i + j, *shape) for j, (name, shape) in enumerate(shapes.items())}
        for i in range(3)
    ]
    params = {"patches": random(99, 48, width), "blocks": blocks}

    def function(params: Any, images: Any) -> Any:
        count = len(images)
        x = images.reshape(count, SIDE // 4, 4, SIDE // 4, 4, 3).swapaxes(2, 3)
        x = x.reshape(count, -1, 48) @ params["patches"]
        for block in params["blocks"]:
            y = jax.nn.standardize(x) @ block["qkv"]
            q, k, v = jnp.split(y.reshape(*x.shape[:2], heads, -1), 3, axis=-1)
            x = x + jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ block["out"]
            x = x + jax.nn.gelu(jax.nn.standardize(x) @ block["up"]) @ block["down"]
        return x.mean(1)

    return Trunk(params, function)


TRUNKS = {
    "linear layers": linear_layers,
    "convolutions": convolutions,
    "transformer": transformer,
}
RULES = [("trunk", None)]


def optimizer() -> Any:
    """The optimizer of the probe."""
    return lm.wrap(optax.adam(1e-3), RULES)


def loss_of(trunk: Trunk) -> Callable[[Any, Any], Any]:
    """The loss of a linear probe on a trunk."""

    def loss(params: Any, batch: Any) -> Any:
        logits = trunk.function(params["trunk"], batch["images"]) @ params["probe"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    return loss


def compiled(loss: Any, params: Any, batch: Any) -> Any:
    """A step of training."""
    tx = optimizer()

    def step(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()


def flops_of(step: Any) -> float:
    """Its floating-point operations, as XLA counts them."""
    found = step.cost_analysis()
    return float((found[0] if isinstance(found, list) else found)["flops"])


class Case:
    """One trunk: data, the probe, and the ways to train it."""

    def __init__(self, name: str, options: Any) -> None:
        self.trunk = TRUNKS[name]()
        draw = np.random.default_rng(0)
        shape = options.examples, SIDE, SIDE, 3
        self.images = draw.standard_normal(shape, dtype=np.float32)
        self.batch_size = options.batch
        classes = self._classes()
        self.data = {
            "images": self.images,
            "labels": draw.integers(0, classes, options.examples, np.int32),
        }
        self.params = self._params(classes)
        self.classes = classes
        self.loss = loss_of(self.trunk)
        self.split = lm.precompute(self.loss, self.params, RULES, self.batch(range(options.batch)))

    def _params(self, classes: int) -> Any:
        width = jax.eval_shape(self.trunk.function, self.trunk.params, self.images[:1]).shape[-1]
        return {"trunk": self.trunk.params, "probe": jnp.zeros((width, classes))}

    def _classes(self) -> int:
        """The number of classes at which the trunk takes its share of the operations of a step."""

        def share(classes: int) -> float:
            shapes = jax.eval_shape(lambda: self._params(classes))
            images = jax.ShapeDtypeStruct((self.batch_size, *self.images.shape[1:]), np.float32)
            labels = jax.ShapeDtypeStruct((self.batch_size,), np.int32)
            batch = {"images": images, "labels": labels}
            whole = flops_of(compiled(loss_of(self.trunk), shapes, batch))
            front = jax.jit(self.trunk.function).lower(shapes["trunk"], images).compile()
            return flops_of(front) / whole

        low, high = 2, 1 << 14
        while high - low > max(low // 50, 1):
            middle = (low + high) // 2
            low, high = (middle, high) if share(middle) > TRUNK else (low, middle)
        return low

    def batch(self, numbers: Any) -> Any:
        """A batch of these examples."""
        return jax.tree.map(lambda array: array[np.asarray(numbers)], self.data)


class Training:
    """A probe that is trained in one of the ways, epoch after epoch.

    Args:
        case: what is trained.
        step: a step of training.
        take: the batch with some examples, as the step takes it.
    """

    def __init__(self, case: Case, step: Any, take: Callable[[Any], Any]) -> None:
        self._case, self._step, self._take = case, step, take
        self.params = jax.tree.map(jnp.copy, case.params)
        self._state = optimizer().init(self.params)
        self._epoch = 0

    def __call__(self) -> None:
        """An epoch."""
        count, size = len(self._case.images), self._case.batch_size
        order = np.random.default_rng(self._epoch).permutation(count)
        params, state = self.params, self._state
        for start in range(0, count, size):
            params, state = self._step(params, state, self._take(order[start : start + size]))
        self.params, self._state = jax.block_until_ready((params, state))
        self._epoch += 1


def seconds(run: Callable[[], Any]) -> float:
    """The time that a run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, options: Any) -> list[dict[str, Any]]:
    """The figures of a trunk: one row for each way."""
    case = Case(name, options)
    whole = compiled(case.loss, case.params, case.batch(range(options.batch)))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name_of_way, where, dtype in (
            ("memory", None, None),
            ("files", pathlib.Path(folder, "full"), None),
            ("files, bfloat16", pathlib.Path(folder, "half"), jnp.bfloat16),
        ):
            start = time.perf_counter()
            cached = lm.CachedFeatures(
                case.split, case.params, case.data, path=where, dtype=dtype, progress=False
            )
            filled = time.perf_counter() - start
            take = cached.__getitem__
            step = compiled(case.split.rest, case.params, take(np.arange(options.batch)))
            ways = [Training(case, step, take), Training(case, whole, case.batch)]
            for way in ways:
                way()
            apart = difference(*[way.params for way in ways])
            ratios, once = [], []
            for pair in range(options.pairs):
                turn = slice(None, None, -1 if pair % 2 else 1)
                times = [seconds(each) for each in ways[turn]]
                mine, theirs = times[turn]
                ratios.append(mine / theirs)
                once.append(filled / theirs)
            rows.append(
                {
                    "trunk": name,
                    "classes": case.classes,
                    "way": name_of_way,
                    "trunk_share": 1 - flops_of(step) / flops_of(whole),
                    "flops_ratio": flops_of(step) / flops_of(whole),
                    "time_ratio": statistics.median(ratios),
                    "time_ratio_range": [min(ratios), max(ratios)],
                    "first_epoch": statistics.median(once),
                    "bytes_per_example": cached.nbytes / len(cached),
                    "difference": apart,
                    "bound_of_difference": SAME if dtype is None else None,
                }
            )
    return rows


def difference(one: Any, two: Any) -> float:
    """The largest difference between two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), one, two)))


def missed(row: dict[str, Any]) -> list[str]:
    """The bounds that a row misses."""
    bounds = {
        "time": row["time_ratio"] <= TIME,
        "operations": row["flops_ratio"] <= FLOPS,
        "weights": row["bound_of_difference"] is None
        or row["difference"] <= row["bound_of_difference"],
    }
    return [f"{row['trunk']}, {row['way']}: {name}" for name, holds in bounds.items() if not holds]


def table(rows: list[dict[str, Any]]) -> Table:
    """All figures."""
    shown = Table(title="cached features, beside lrmult.wrap in one jit")
    for column in (
        "trunk",
        "classes",
        "kept in",
        "operations",
        "epoch",
        "to fill",
        "bytes",
        "weights",
    ):
        shown.add_column(column, justify="left" if column in ("trunk", "kept in") else "right")
    for row in rows:
        low, high = row["time_ratio_range"]
        shown.add_row(
            row["trunk"],
            f"{row['classes']:,}",
            row["way"],
            f"{row['flops_ratio']:.3f}",
            f"{row['time_ratio']:.3f} ({low:.3f} to {high:.3f})",
            f"{row['first_epoch']:.2f} epochs",
            f"{row['bytes_per_example']:,.0f}",
            f"{row['difference']:.0e}",
        )
    return shown


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=TRUNKS, default=list(TRUNKS), metavar="TRUNK")
    parser.add_argument("--pairs", type=int, default=9, help="of epochs, for each ratio of times")
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", metavar="FILE", help="where all figures are kept")
    options = parser.parse_args()
    rows = [row for name in options.only for row in measure(name, options)]
    Console(width=140).print(table(rows))
    failures = [what for row in rows for what in missed(row)]
    for what in failures:
        print(f"missed: {what}")
    if options.json:
        about = {
            "jax": jax.__version__,
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "options": vars(options),
        }
        with open(options.json, "w") as file:
            json.dump({**about, "rows": rows, "missed": failures}, file, indent=1)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
