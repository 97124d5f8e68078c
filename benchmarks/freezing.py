"""What freezing saves in a train step, beside a hand-written step that does no frozen work.

A step is the loss, its gradient and the update of a small transformer in one ``jit``, with
parameters and state donated. There are three cases: ``prefix`` (the embedding and the lowest 90 %
of the blocks are frozen), ``bitfit`` (biases alone train) and ``head`` (the last layer alone
trains). The ceiling is written by hand: frozen arrays are arguments of their own that are never
differentiated, activations that come out of frozen layers are stopped, and the optimizer knows
nothing but what trains. Beside it stand:

* adamw, with nothing frozen;
* the same followed by `lrmult.scale_by_rules`, which freezes by zeros;
* `optax.selective_transform`;
* adamw on a tree of the trainable arrays, with the gradient with respect to that tree;
* `lrmult.wrap`, which is held to the bounds: floating-point operations within 1 % of the ceiling,
  temporary memory at most 1.05 times, optimizer state to the byte, and the step time at most 1.10
  times (the median ratio of paired, interleaved runs).

The bounds hold also with clipping by the global norm inside (``clip``), in an ``nnx.Optimizer``
(``nnx``) and for several steps in a ``lax.scan`` (``scan``). With the gradient in a ``jit`` of its
own (``grad``), `lrmult.stop_frozen` keeps it within 1 % of the operations of the ceiling.

``compact`` is about a large embedding, 64 rows of which train, beside ``wrap`` without
``compact=True``: its state is at most 0.005 of what adam keeps for the whole, trained rows are the
same to the bit where nothing is fused, and a step takes at most 1.10 times as long.

Run with ``python benchmarks/freezing.py``, or a part of it quickly with ``--only prefix head
--variants step --pairs 5``; exits with 1 if a bound is missed. Times are to be believed on a quiet
machine only.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import lrmult as lm

FLOPS, TEMP, TIME, COMPACT_STATE = 0.01, 1.05, 1.10, 0.005
ROWS = 64
SAME_LOSS, SAME_VALUE = 1e-4, 1e-6


# The model. Weights and biases are two arguments, which are the same tree where all is in one.


def dense(weights: Any, biases: Any, x: Any) -> Any:
    """A linear layer."""
    return x @ weights["kernel"] + biases["bias"]


def norm(weights: Any, biases: Any, x: Any) -> Any:
    """Layer normalization."""
    return jax.nn.standardize(x) * weights["scale"] + biases["bias"]


def block(weights: Any, biases: Any, x: Any, heads: int) -> Any:
    """Self-attention and an MLP, each after a norm and with a residual."""

    def layer(name: str, x: Any) -> Any:
        return (norm if name.startswith("norm") else dense)(weights[name], biases[name], x)

    y = layer("norm_1", x)
    q, k, v = (
        layer(name, y).reshape(*x.shape[:2], heads, -1) for name in ("query", "key", "value")
    )
    x = x + layer("out", jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
    return x + layer("down", jax.nn.gelu(layer("up", layer("norm_2", x))))


def cross_entropy(logits: Any, batch: Any) -> Any:
    """The loss of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def loss_of(weights: Any, biases: Any, batch: Any, heads: int) -> Any:
    """The loss of the model."""
    x = weights["embed"][batch["tokens"]]
    for some in zip(weights["blocks"], biases["blocks"], strict=True):
        x = block(*some, x, heads)
    return cross_entropy(dense(weights["head"], biases["head"], x), batch)


def parameters(options: Any) -> Any:
    """The parameters of the model."""
    random = np.random.default_rng(0)
    width, wide = options.width, 4 * options.width

    def kernel(rows: int, columns: int) -> Any:
        values = random.standard_normal((rows, columns), dtype=np.float32)
        return jnp.asarray(values / np.sqrt(rows, dtype=np.float32))

    def linear(rows: int, columns: int) -> Any:
        return {"kernel": kernel(rows, columns), "bias": jnp.zeros(columns)}

    shapes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    shapes |= {"up": (width, wide), "down": (wide, width)}
    return {
        "embed": kernel(options.vocabulary, width),
        "blocks": [
            {name: linear(*shape) for name, shape in shapes.items()}
            | {
                name: {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
                for name in ("norm_1", "norm_2")
            }
            for _ in range(options.depth)
        ],
        "head": linear(width, options.vocabulary),
    }


def batch_of(options: Any) -> Any:
    """Tokens and labels."""
    tokens = np.random.default_rng(1).integers(
        0, options.vocabulary, (options.batch, options.length + 1), dtype=np.int32
    )
    return {"tokens": jnp.asarray(tokens[:, :-1]), "labels": jnp.asarray(tokens[:, 1:])}


class Block(nnx.Module):
    """A block of the model, for NNX."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm_1, self.norm_2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """What comes out for what goes in."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm_1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Model(nnx.Module):
    """The model, for NNX."""

    def __init__(self, options: Any):
        rngs, width = nnx.Rngs(0), options.width
        self.embed = nnx.Embed(options.vocabulary, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, options.heads, rngs) for _ in range(options.depth)])
        self.head = nnx.Linear(width, options.vocabulary, rngs=rngs)

    def __call__(self, tokens: Any, frozen: int = 0) -> Any:
        """Logits; gradients stop below the first blocks that are not frozen."""
        x = self.embed(tokens)
        for i, some in enumerate(self.blocks):
            x = some(jax.lax.stop_gradient(x) if i == frozen else x)
        return self.head(jax.lax.stop_gradient(x) if frozen == len(self.blocks) else x)


# The cases.


class Case(NamedTuple):
    """What is frozen, and how that is written by hand.

    Attributes:
        rules: what is frozen, as rules.
        split: makes a tree of what trains, and one of what does not.
        loss: the loss of these two.
        below: the number of blocks through which no gradient flows.
        trains: which variables of the NNX model train.
    """

    rules: Any
    split: Callable[[Any], tuple[Any, Any]]
    loss: Callable[[Any, Any, Any], Any]
    below: int
    trains: Any


def prefix(options: Any, frozen: int) -> Case:
    """The embedding and so many blocks are frozen; the NNX model is cut by its paths."""

    def split(params: Any) -> tuple[Any, Any]:
        blocks = params["blocks"]
        return (
            {"blocks": blocks[frozen:], "head": params["head"]},
            {"embed": params["embed"], "blocks": blocks[:frozen]},
        )

    def loss(trained: Any, fixed: Any, batch: Any) -> Any:
        x = fixed["embed"][batch["tokens"]]
        for each in fixed["blocks"]:
            x = block(each, each, x, options.heads)
        x = jax.lax.stop_gradient(x)
        for each in trained["blocks"]:
            x = block(each, each, x, options.heads)
        return cross_entropy(dense(trained["head"], trained["head"], x), batch)

    def trains(path: Any, _: Any) -> bool:
        return path[0] == "head" or (path[0] == "blocks" and path[1] >= frozen)

    return Case(
        [("embed", None), (f"blocks[:{frozen}]", None)],
        split,
        loss,
        frozen,
        nnx.All(nnx.Param, trains),
    )


def bitfit(options: Any) -> Case:
    """Only biases train."""

    def pick(tree: Any, biases: bool) -> Any:
        if isinstance(tree, list):
            return [pick(each, biases) for each in tree]
        return {
            name: pick(each, biases) if isinstance(each, dict | list) else each
            for name, each in tree.items()
            if isinstance(each, dict | list) or (name == "bias") is biases
        }

    return Case(
        [("**/bias", 1), (..., None)],
        lambda params: (pick(params, True), pick(params, False)),
        lambda trained, fixed, batch: loss_of(fixed, trained, batch, options.heads),
        -1,
        nnx.All(nnx.Param, lambda path, _: path[-1] == "bias"),
    )


def head(options: Any) -> Case:
    """Only the last layer trains."""
    return prefix(options, options.depth)._replace(rules=[("head", 1), (..., None)])


CASES = {
    "prefix": lambda options: prefix(options, options.depth * 9 // 10),
    "bitfit": bitfit,
    "head": head,
}


# Programs, and what they cost.

COSTS = "flops", "temp", "state"


class Program:
    """A step, each run of which goes on from the last; three are taken at once.

    Attributes:
        costs: its floating-point operations, and the bytes of temporary memory and optimizer state.
        loss: that of the third run.
        carried: what the step takes first, and returns first.

    Args:
        step: the step.
        compiled: what tells the costs.
        state: the optimizer's state.
        carried: as above.
        others: what else the step takes.
    """

    def __init__(self, step: Any, compiled: Any, state: Any, carried: Any, *others: Any) -> None:
        self.costs = costs_of(compiled) | {"state": size_of(state)}
        self.carried, self._step, self._others = carried, step, others
        self.loss = [float(jnp.mean(self.run())) for _ in range(3)][-1]

    def run(self) -> Any:
        """Take a step, and return the loss."""
        self.carried, loss = self._step(self.carried, *self._others)
        return jax.block_until_ready((self.carried, loss))[1]


def costs_of(compiled: Any) -> dict[str, float]:
    """What a compiled program costs."""
    return {
        "flops": compiled.cost_analysis()["flops"],
        "temp": compiled.memory_analysis().temp_size_in_bytes,
    }


def size_of(tree: Any) -> int:
    """The bytes of a tree of arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def program(
    gradient: Any, tx: Any, trained: Any, fixed: Any, batch: Any, steps: int = 0
) -> Program:
    """A donated train step, or so many of them in a scan."""

    def step(carried: Any, fixed: Any, batch: Any) -> Any:
        params, state = carried
        value, grads = gradient(params, fixed, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def scanned(carried: Any, fixed: Any, batches: Any) -> Any:
        return jax.lax.scan(lambda kept, batch: step(kept, fixed, batch), carried, batches)

    if steps:
        batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * steps), batch)
    carried = jax.tree.map(jnp.copy, trained), tx.init(trained)
    jitted = jax.jit(scanned if steps else step, donate_argnums=0)
    compiled = jitted.lower(carried, fixed, batch).compile()
    return Program(compiled, compiled, carried[1], carried, fixed, batch)


def nnx_program(tx: Any, trains: Any, frozen: int, options: Any) -> Program:
    """A donated train step of the NNX model, with these variables in the optimizer."""
    model, batch = Model(options), batch_of(options)
    optimizer = nnx.Optimizer(model, tx, wrt=trains)

    def loss(model: Any, batch: Any) -> Any:
        return cross_entropy(model(batch["tokens"], frozen), batch)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trains))(model, batch)
        optimizer.update(model, grads)
        return value

    compiled = step.lower(model, optimizer, batch).compile()
    state = nnx.state(optimizer)
    return Program(lambda _: (None, step(model, optimizer, batch)), compiled, state, None)


# What is measured and kept.


class Report:
    """Keeps figures, and knows which of them missed their bounds."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.missed: list[str] = []

    def row(self, part: str, form: str, **figures: Any) -> dict[str, Any]:
        """Keep some figures."""
        self.rows.append({"part": part, "form": form, **figures})
        print(f"{part}: {form}", file=sys.stderr, flush=True)
        return self.rows[-1]

    def bound(self, what: str, holds: bool) -> None:
        """Keep a bound if it is missed."""
        if not holds:
            self.missed.append(what)

    def compare(
        self, part: str, forms: dict[str, Program], base: str, pairs: int
    ) -> dict[str, dict[str, Any]]:
        """Programs beside one of them: rows by form, with ratios of costs and of paired runs.

        Paired runs go in alternating order; two warming pairs are left out.
        """
        ceiling = forms[base]
        found = {base: self.row(part, base, **ceiling.costs)}
        for form, some in forms.items():
            if form == base:
                continue
            times = {}
            for i in range(pairs + 2):
                for which in (some, ceiling)[:: 1 if i % 2 else -1]:
                    start = time.perf_counter()
                    which.run()
                    times.setdefault(which, []).append(time.perf_counter() - start)
            each, every = times[some][2:], times[ceiling][2:]
            quotients = sorted(a / b for a, b in zip(each, every, strict=True))
            quarter = len(quotients) // 4
            found[base]["seconds"] = statistics.median(every)
            found[form] = self.row(
                part,
                form,
                **some.costs,
                **{f"{cost}_ratio": some.costs[cost] / ceiling.costs[cost] for cost in COSTS},
                seconds=statistics.median(each),
                time_ratio=statistics.median(quotients),
                quartiles=[quotients[quarter], quotients[-quarter - 1]],
            )
        return found

    def table(self) -> Table:
        """All figures."""
        table = Table("part", "form")
        for name in (
            "MFLOP",
            "ratio",
            "temp MiB",
            "ratio",
            "state MiB",
            "ms",
            "ratio",
            "quartiles",
        ):
            table.add_column(name, justify="right", no_wrap=True)
        part = ""
        for row in self.rows:
            if row["part"] != part:
                table.add_section()
            columns = [
                f"{row[name] / unit:,.{digits}f}" if name in row else ""
                for name, unit, digits in (
                    ("flops", 1e6, 1),
                    ("flops_ratio", 1, 3),
                    ("temp", 2**20, 2),
                    ("temp_ratio", 1, 3),
                    ("state", 2**20, 3),
                    ("seconds", 1e-3, 1),
                    ("time_ratio", 1, 3),
                )
            ]
            quartiles = "-".join(f"{each:.2f}" for each in row.get("quartiles", []))
            table.add_row(row["part"] * (row["part"] != part), row["form"], *columns, quartiles)
            part = row["part"]
        return table


# The parts.


def adamw() -> Any:
    """The optimizer, its weight decay as it comes."""
    return optax.adamw(1e-3)


def clipped() -> Any:
    """The optimizer after clipping by the global norm."""
    return optax.chain(optax.clip_by_global_norm(1.0), adamw())


def subtree(case: Case, params: Any, batch: Any, options: Any) -> Program:
    """The gradient with respect to a list of the arrays that train."""
    leaves, treedef = jax.tree.flatten(params)
    trains = jax.tree.leaves(lm.trainable_mask(case.rules)(params))

    def loss(trained: Any, fixed: Any, batch: Any) -> Any:
        some = iter(fixed), iter(trained)
        whole = treedef.unflatten([next(some[each]) for each in trains])
        return loss_of(whole, whole, batch, options.heads)

    fixed, trained = (
        [leaf for leaf, each in zip(leaves, trains, strict=True) if each is which]
        for which in (False, True)
    )
    return program(jax.value_and_grad(loss), adamw(), trained, fixed, batch)


def measure(report: Report, name: str, options: Any) -> None:
    """A case, in all variants."""
    case, params, batch = CASES[name](options), parameters(options), batch_of(options)
    split = case.split(params)
    frozen = jax.tree.map(lambda trains: not trains, lm.trainable_mask(case.rules)(params))

    def loss(params: Any, fixed: Any, batch: Any) -> Any:
        del fixed
        return loss_of(params, params, batch, options.heads)

    def whole(tx: Any, steps: int = 0) -> Program:
        return program(jax.value_and_grad(loss), tx, params, (), batch, steps)

    def by_hand(tx: Any, steps: int = 0) -> Program:
        return program(jax.value_and_grad(case.loss), tx, *split, batch, steps)

    def selective(tx: Any) -> Any:
        return optax.selective_transform(tx, freeze_mask=frozen)

    def wrap(tx: Any) -> Any:
        return lm.wrap(tx, case.rules)

    def step() -> dict[str, Program]:
        zeroed = optax.chain(adamw(), lm.scale_by_rules(case.rules))
        return {
            "by hand": by_hand(adamw()),
            "wrap": whole(wrap(adamw())),
            "subtree": subtree(case, params, batch, options),
            "selective": whole(selective(adamw())),
            "then zeros": whole(zeroed),
            "adamw": whole(adamw()),
        }

    def clip() -> dict[str, Program]:
        return {
            "by hand": by_hand(clipped()),
            "wrap": whole(wrap(clipped())),
            "selective": whole(selective(clipped())),
        }

    def in_nnx() -> dict[str, Program]:
        return {
            "by hand": nnx_program(adamw(), case.trains, case.below, options),
            "wrap": nnx_program(wrap(adamw()), nnx.Param, -1, options),
        }

    def scan() -> dict[str, Program]:
        return {
            "by hand": by_hand(adamw(), options.steps),
            "wrap": whole(wrap(adamw()), options.steps),
            "selective": whole(selective(adamw()), options.steps),
        }

    variants = {"step": step, "clip": clip, "nnx": in_nnx, "scan": scan}
    for variant in options.variants:
        part = f"{name}, {variant}"
        if variant == "grad":
            apart(report, part, case, params, batch, loss)
            continue
        forms = variants[variant]()
        if variant != "nnx":
            lm.assert_frozen(params, forms["wrap"].carried[0], case.rules)
        losses = [forms[form].loss for form in ("wrap", "by hand")]
        report.bound(f"{part}: losses {losses}", math.isclose(*losses, rel_tol=SAME_LOSS))
        row = report.compare(part, forms, "by hand", options.pairs)["wrap"]
        report.bound(f"{part}: operations", abs(row["flops_ratio"] - 1) <= FLOPS)
        report.bound(f"{part}: temporary memory", row["temp_ratio"] <= TEMP)
        report.bound(f"{part}: state", row["state_ratio"] == 1)
        report.bound(f"{part}: time", row["time_ratio"] <= TIME)


def apart(report: Report, part: str, case: Case, params: Any, batch: Any, loss: Any) -> None:
    """The gradient in a jit of its own."""

    def stopped(params: Any, fixed: Any, batch: Any) -> Any:
        return loss(lm.stop_frozen(params, case.rules), fixed, batch)

    found = {}
    for form, some, arguments in (
        ("by hand", case.loss, case.split(params)),
        ("stop_frozen", stopped, (params, ())),
        ("all gradients", loss, (params, ())),
    ):
        costs = costs_of(jax.jit(jax.value_and_grad(some)).lower(*arguments, batch).compile())
        found[form] = report.row(part, form, **costs)
        for cost in costs:
            found[form][f"{cost}_ratio"] = costs[cost] / found["by hand"][cost]
    ratio = found["stop_frozen"]["flops_ratio"]
    report.bound(f"{part}: operations", abs(ratio - 1) <= FLOPS)


def compact(report: Report, options: Any) -> None:
    """A large embedding, few rows of which train."""
    random = np.random.default_rng(0)
    rows, width = options.rows, options.row_width
    params = {
        "embed": jnp.asarray(random.standard_normal((rows, width), dtype=np.float32)),
        "head": jnp.asarray(0.01 * random.standard_normal((width, ROWS), dtype=np.float32)),
    }
    grads = jax.tree.map(lambda leaf: 0.01 * jnp.cos(leaf), params)
    full = size_of(jax.eval_shape(optax.adam(1e-3).init, params))

    def given(params: Any, fixed: Any, batch: Any) -> Any:
        del params, batch
        return jnp.zeros(()), fixed

    def loss(params: Any, fixed: Any, batch: Any) -> Any:
        del fixed
        return cross_entropy(params["embed"][batch["tokens"]] @ params["head"], batch)

    lookup = jax.value_and_grad(loss)
    for where, chosen in (
        ("scattered", np.sort(random.permutation(rows)[:ROWS])),
        ("last", np.arange(rows - ROWS, rows)),
    ):
        rules = [(lm.rows("embed", chosen.tolist()), 1), (..., None)]
        tokens = np.concatenate([chosen, random.integers(0, rows, 7 * ROWS)])
        batch = {"tokens": jnp.asarray(tokens), "labels": jnp.asarray(tokens % ROWS)}

        def run(gradient: Any, tx: Any, small: bool, rules: Any = rules, batch: Any = batch) -> Any:
            wrapped = lm.wrap(tx, rules, compact=small)
            some = program(gradient, wrapped, params, grads if gradient is given else (), batch)
            lm.assert_frozen(params, some.carried[0], rules)
            return some

        for what, gradient in (("given", given), ("lookup", lookup)):
            part = f"compact, {where}, {what}"
            forms = {
                form: run(gradient, adamw(), form == "compact") for form in ("wrap", "compact")
            }
            trained = [np.asarray(some.carried[0]["embed"])[chosen] for some in forms.values()]
            row = report.compare(part, forms, "wrap", options.pairs)["compact"]
            row["of_full_state"] = row["state"] / full
            row["difference"] = float(np.abs(trained[0] - trained[1]).max())
            report.bound(f"{part}: state", row["of_full_state"] <= COMPACT_STATE)
            report.bound(f"{part}: trained rows", row["difference"] <= SAME_VALUE)
            report.bound(f"{part}: time", row["time_ratio"] <= TIME)
        same = same_bits(rules, params, grads, chosen)
        report.row(f"compact, {where}, rows", "same bits" if same else "other bits")
        report.bound(f"compact, {where}: bits of rows", same)
        for name, tx in (
            ("adafactor", optax.adafactor(1e-3)),
            ("muon", optax.contrib.muon(1e-3)),
        ):
            some = run(lookup, tx, True)
            report.row(f"compact, {where}, others", name, **some.costs)
            moved = np.asarray(some.carried[0]["embed"] - params["embed"])[chosen]
            report.bound(
                f"compact, {where}, {name}: it trains", np.isfinite(moved).all() and moved.any()
            )


def same_bits(rules: Any, params: Any, grads: Any, chosen: Any) -> bool:
    """Whether rows are the same with and without ``compact``, to the bit, after three steps.

    The operations run one by one. In one program a compiler may or may not round between a product
    and a sum, which depends on what else stands there.
    """
    found = []
    for small in (False, True):
        tx, kept = lm.wrap(optax.adam(1e-3), rules, compact=small), params
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, kept)
            kept = optax.apply_updates(kept, updates)
        found.append(np.asarray(kept["embed"])[chosen].tobytes())
    return found[0] == found[1]


VARIANTS = "step", "clip", "nnx", "scan", "grad"
PARTS: dict[str, Callable[[Report, Any], None]] = {
    **{name: functools.partial(measure, name=name) for name in CASES},
    "compact": compact,
}


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="CASE")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--pairs", type=int, default=21, help="of runs, for each ratio of times")
    parser.add_argument("--json", metavar="FILE", help="where all figures are kept")
    for name, size, what in (
        ("--depth", 10, "blocks of the transformer"),
        ("--width", 256, "of the transformer"),
        ("--heads", 4, "of its attention"),
        ("--vocabulary", 512, "of its tokens"),
        ("--batch", 4, "sequences in a batch"),
        ("--length", 64, "tokens in a sequence"),
        ("--steps", 3, "steps in a scan"),
        ("--rows", 50_000, "of the embedding of the compact case"),
        ("--row-width", 512, "its columns"),
    ):
        parser.add_argument(name, type=int, default=size, help=f"{what} (%(default)s)")
    options = parser.parse_args()
    report = Report()
    for name in options.only:
        PARTS[name](report, options=options)
    Console(width=140).print(report.table())
    for what in report.missed:
        print(f"missed: {what}")
    if options.json:
        about = {
            "jax": jax.__version__,
            "optax": optax.__version__,
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "options": vars(options),
        }
        with open(options.json, "w") as file:
            json.dump({**about, "rows": report.rows, "missed": report.missed}, file, indent=1)
    return int(bool(report.missed))


if __name__ == "__main__":
    sys.exit(main())
