"""Fix one layer inside a recurrent network, and let what is around it learn through it.

A tracker hears twice a second where something is, with noise and gaps. It is a fold over time of
three layers. l3 moves position and velocity on by half a second, by [[1, 0.5], [0, 1]], which is
physics and is not to be learned; l1 and l2 learn to correct that by what is heard.

How to keep such an l3 fixed inside a fold was asked about LearningRateMultipliers of the Wolfram
Language. Four spellings were tried: two trained l3 all the same, without a word, and two gave
errors of no help. Here all four are errors that say what is wrong, before the first step. For
comparison l3 is trained too, from that same matrix: positions are found about as well, but what was
the velocity no longer is, since nothing is ever told of velocities but by l3.

    python examples/recurrent.py [--output recurrent.png] [--seed 0]

It needs no network, half a minute of two CPU cores, and ``pip install -e '.[examples]'``.
"""

import argparse
import functools
import sys
import textwrap
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from matplotlib.figure import Figure

import lrmult as lm

KNOWN = np.array([[1, 0.5], [0, 1]], np.float32)  # position += 0.5 * velocity
WRONG = (
    [(..., 1), ("cell/l3", None)],
    [("cell", 1), ("cell/l3", None)],
    [("l3", None)],
    [(3, None)],
)
RULES = [("cell/l3", None)]

HEARD, AHEAD = 40, 20  # steps of half a second: with measurements, and forecast after them
NOISE, GLINTS, GLINT = 0.4, 0.06, 8.0  # in m; how many measurements are off by how many times that
PUSH = 0.08  # in m/s: how much velocity changes in a step
MEMORY, OBJECTS, BATCH, STEPS, RUNS, EVERY = 16, 500, 64, 400, 3, 10
SHOWN = 8  # tracks in the picture
BOLD = {"weight": "bold", "size": 11}
LEGEND = {"frameon": False, "labelcolor": "linecolor", "handlelength": 0}

ADAM = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))
)
KINDS = {"fixed": lm.wrap(ADAM, RULES), "trained": lm.wrap(ADAM, [])}
COLORS = {"fixed": "#1f6f8b", "trained": "#d55e00"}

Data = namedtuple("Data", ["inputs", "states", "seen"])  # a row is one coordinate of one object


def fold(cell, carry, x):
    """One step of time, with layers of either library."""
    (state, memory), (heard, seen) = carry, (x[..., :1], x[..., 1:])
    state = cell.l3(state)
    surprise = heard - state[..., :1]
    learned = jnp.tanh(cell.l1(jnp.concatenate([surprise, memory], axis=-1)))
    memory = jnp.where(seen > 0, learned, memory)
    state += seen * cell.l2(memory)  # so in a gap l3 alone moves the state on
    return (state, memory), state


def at_rest(shape: tuple[int, ...]):
    """The carry of the first step: all things start at 0, with a velocity that is not known."""
    return jnp.zeros((*shape[:-1], 2)), jnp.zeros((*shape[:-1], MEMORY))


class Cell(nnx.RNNCellBase):
    """The three layers in Flax NNX."""

    num_feature_axes = 1

    def __init__(self, rngs: nnx.Rngs):
        self.l1 = nnx.Linear(1 + MEMORY, MEMORY, rngs=rngs)
        self.l2 = nnx.Linear(MEMORY, 2, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.l3 = nnx.Linear(2, 2, use_bias=False, rngs=rngs)

    def __call__(self, carry, x):
        """The next carry, and the state."""
        return fold(self, carry, x)

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        """The first carry."""
        return at_rest(input_shape)


class LinenCell(linen.RNNCellBase):
    """The three layers in Flax Linen."""

    num_feature_axes = 1

    def setup(self):
        """Make the layers."""
        self.l1, self.l2 = linen.Dense(MEMORY), linen.Dense(2)
        self.l3 = linen.Dense(2, use_bias=False)

    def __call__(self, carry, x):
        """The next carry, and the state."""
        return fold(self, carry, x)

    def initialize_carry(self, rng, input_shape):
        """The first carry."""
        return at_rest(input_shape)


LINEN = linen.RNN(LinenCell())


def tracks(steps: int, seed: int) -> Data:
    """Things that start at 0 and drift, as they are heard; rows are x of all, then y of all."""
    rng, time = np.random.default_rng(seed), np.arange(steps)
    pushes = PUSH * rng.normal(size=(2, OBJECTS, steps))
    pushes[..., 0] = rng.normal(size=(2, OBJECTS))
    velocity = np.cumsum(pushes, axis=-1)
    positions = 0.5 * (np.cumsum(velocity, axis=-1) - velocity)  # at 0 first
    sizes = NOISE * np.where(rng.random((OBJECTS, steps)) < GLINTS, GLINT, 1)
    heard = positions + sizes * rng.normal(size=positions.shape)
    begin, length = rng.integers(8, HEARD - 8, (OBJECTS, 1)), rng.integers(2, 9, (OBJECTS, 1))
    gap = (time >= begin) & (time < begin + length)
    seen = np.broadcast_to(~gap & (time < HEARD), heard.shape)
    inputs = np.stack([heard * seen, seen], axis=-1, dtype=np.float32)
    states = np.stack([positions, velocity], axis=-1, dtype=np.float32)
    return Data(*(part.reshape(-1, *part.shape[2:]) for part in (inputs, states, seen)))


def loss_of(found, states):
    """The mean squared error of the positions; of velocities nothing is ever told."""
    return ((found - states)[..., 0] ** 2).mean()


@jax.jit
def states_of(params, inputs):
    """The states at all steps; parameters are laid out alike in both libraries."""
    return LINEN.apply({"params": params}, inputs)


@nnx.jit
def nnx_step(model, optimizer, inputs, states):
    """One step of training."""

    def loss(model):
        return loss_of(model(inputs), states)

    optimizer.update(model, nnx.grad(loss)(model))


def train_nnx(model: nnx.RNN, tx: optax.GradientTransformation, parts) -> Iterator[dict]:
    """Train in NNX; give the parameters after each part of the batches."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for batches in parts:
        for batch in batches:
            nnx_step(model, optimizer, *batch)
        yield params_of(model)


@functools.partial(jax.jit, static_argnames="tx")
def linen_step(tx, params, state, inputs, states):
    """One step of training."""

    def loss(params):
        return loss_of(states_of(params, inputs), states)

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def train_linen(model: nnx.RNN, tx: optax.GradientTransformation, parts) -> Iterator[dict]:
    """The same in Linen, which has the same parameters at the same paths."""
    params = params_of(model)
    state = tx.init(params)
    for batches in parts:
        for batch in batches:
            params, state = linen_step(tx, params, state, *batch)
        yield params


def params_of(model: nnx.RNN) -> dict:
    """A copy of the parameters, as dicts of arrays."""
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def fit(kind: str, train: Data, seed: int, trainer=train_linen) -> list[dict]:
    """Train a new network in one of the libraries; the parameters before, on the way and after."""
    model = nnx.RNN(Cell(nnx.Rngs(seed)))
    lm.replace(model, "cell/l3/kernel", KNOWN.T)  # Flax multiplies by a kernel from the right
    start = params_of(model)
    rows = np.random.default_rng(seed).integers(0, len(train.inputs), (STEPS, BATCH))
    parts = np.split(rows, STEPS // EVERY)
    batches = ([(train.inputs[k], train.states[k]) for k in part] for part in parts)
    return [start, *trainer(model, KINDS[kind], batches)]


def kalman(inputs) -> np.ndarray:
    """The best that is linear in what is heard; it is told how things move, and all variances."""
    states, spread, found = np.zeros((len(inputs), 2)), np.diag([0.0, 1.0]), []
    spread = np.repeat(spread[None], len(inputs), axis=0)
    noise = NOISE**2 * (1 - GLINTS + GLINTS * GLINT**2)
    for t in range(inputs.shape[1]):
        heard, seen = inputs[:, t, :1], inputs[:, t, 1:]
        if t > 0:
            states = states @ KNOWN.T
            spread = KNOWN @ spread @ KNOWN.T + np.diag([0, PUSH**2])
        gain = seen * spread[:, :, 0] / (spread[:, :1, 0] + noise)
        states = states + gain * (heard - states[:, :1])
        spread = spread - gain[:, :, None] * spread[:, :1]
        found.append(states)
    return np.stack(found, axis=1)


def misses(found, test: Data) -> np.ndarray:
    """Root mean square errors of positions: heard, in gaps, ahead; and of the last velocities."""
    square = np.square(found - test.states)
    gaps = ~test.seen & (np.arange(HEARD + AHEAD) < HEARD)
    position, last = square[..., 0], square[:, HEARD - 1, 1]
    return np.sqrt(
        [part.mean() for part in (position[test.seen], position[gaps], position[:, -1], last)]
    )


def reach(params, test: Data, rules=(), cut: str = "") -> list[float]:
    """How the error at the very last step pulls at each layer: the norms of its gradient."""

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        return jax.lax.stop_gradient(out) if context.module.name == cut else out

    def loss(params):
        params = lm.stop_frozen(params, rules)
        with linen.intercept_methods(intercept):
            found = LINEN.apply({"params": params}, test.inputs)
        return loss_of(found[:, -1], test.states[:, -1])

    layers = jax.jit(jax.grad(loss))(params)["cell"]
    return [float(optax.global_norm(layers[name])) for name in ("l1", "l2", "l3")]


def draw_tracks(ax, test: Data, found: np.ndarray) -> None:
    """Draw some tracks: what was heard of them, what is found, and the forecasts."""
    ax.set_title(f"{SHOWN} of {OBJECTS} tracks from one point, in m", **BOLD)
    x, y = test.states[:, -1, 0].reshape(2, OBJECTS)
    sector = np.floor((np.arctan2(y, x) / np.pi + 1) / 2 * SHOWN)
    for k in (int(np.argmax(sector == i)) for i in range(SHOWN)):  # the first that goes each way
        both, color = [k, OBJECTS + k], COLORS["fixed"]
        truth, heard, path = (a[both, :, 0] for a in (test.states, test.inputs, found))
        ax.plot(*truth, color="0.85", lw=6, solid_capstyle="round", label="truth")
        ax.plot(*heard[:, test.seen[k]], ".", color="0.35", ms=4, label="heard")
        ax.plot(*path[:, :HEARD], color=color, lw=1.8, label="found")
        ax.plot(*path[:, HEARD - 1 :], ":", color=color, lw=2.2, label="forecast by l3 alone")
        ax.plot(*path[:, -1:], "o", color=color, ms=5)
    handles, labels = ax.get_legend_handles_labels()
    handle_of = dict(zip(labels, handles, strict=True))
    ax.legend(handle_of.values(), handle_of, frameon=False, loc="lower right")
    ax.set_aspect("equal", adjustable="datalim")


def draw_velocities(ax, test: Data, found: dict[str, list]) -> None:
    """Draw by how much the second number of the state is not the velocity; a line is one run."""
    ax.set_title("Mean error of the velocity, which is never taught, in m/s", **BOLD)
    truth = test.states[:, HEARD - 1, 1]
    order = np.argsort(truth)
    for name in ("trained", "fixed"):
        errors = [
            (f[:, HEARD - 1, 1] - truth)[order].reshape(20, -1).mean(axis=1) for f in found[name]
        ]
        at = truth[order].reshape(20, -1).mean(axis=1)
        line, *_ = ax.plot(at, np.transpose(errors), "o-", ms=4, lw=1.5, color=COLORS[name])
        line.set_label(f"l3 {name}")
    ax.axhline(0, color="0.2", lw=1)
    ax.set(xlabel="velocity after the last measurement, in twentieths of all tracks")
    ax.legend(**LEGEND)


def draw_l3(ax, runs: dict[str, list[list[dict]]]) -> None:
    """Draw the four numbers of l3 while the rest trains."""
    ax.set_title("The four numbers of l3 in training", **BOLD)
    steps = np.arange(0, STEPS + 1, EVERY)
    for name in ("trained", "fixed"):
        for run in runs[name]:
            numbers = [params["cell"]["l3"]["kernel"].ravel() for params in run]
            lines = ax.plot(steps, numbers, color=COLORS[name], lw=2)
        lines[0].set_label(f"l3 {name}")
    place = {"size": 9, "color": "0.3", "ha": "right"}
    ax.text(STEPS, 0.9, "position from position, velocity from velocity", place, va="top")
    ax.text(STEPS, 0.54, "position from velocity", place)
    ax.text(STEPS, 0.06, "velocity from position", place)
    ax.set(xlabel="step", xlim=(0, STEPS))
    ax.legend(**LEGEND, loc="center left", bbox_to_anchor=(0, 0.73))


def show_rules(params) -> None:
    """Print what rules can speak of, what is said of four lists of them, and a plan."""
    print("The paths, in NNX and in Linen:\n", *lm.paths(params), sep="\n    ")
    print("\nFour spellings that do not fix l3:")
    for rules in WRONG:
        try:
            lm.compile_rules(rules, params)
        except lm.LrmultError as error:
            text = textwrap.fill(f"{type(error).__name__}: {error}", 92)
            print(f"\n    {rules}".replace("Ellipsis", "..."))
            print(textwrap.indent(text, " " * 8))
        else:
            sys.exit(f"error: {rules} was no error")
    print(f"\nThe one that does, {RULES}:\n", lm.compile_rules(RULES, params), sep="\n")


def show_errors(errors: dict[str, np.ndarray], runs: dict[str, list[list[dict]]]) -> None:
    """Print how far off each kind of network is, and what became of its l3."""
    print(
        f"\nErrors on {OBJECTS} other tracks, means of {RUNS} runs; and l3 after the first run:\n"
    )
    print(f"{'':15}              position, m           velocity,")
    print(f"{'':15}    heard   in gaps  10 s ahead         m/s   l3")
    for name, error in errors.items():
        cells = "{:9.3f}{:10.3f}{:12.3f}{:12.3f}".format(*error)
        l3 = runs[name][0][-1]["cell"]["l3"]["kernel"].T if name in runs else ()
        rows = ("[" + ", ".join(f"{x:.3f}" for x in row) + "]" for row in l3)
        print(f"{name:15}{cells}   {' '.join(rows)}".rstrip())


def show_frozen(runs: dict[str, list[list[dict]]]) -> None:
    """Compare bits before and after; end the program unless l3 alone, fixed, kept them."""
    fixed = runs["fixed"] + runs["fixed, in NNX"]
    for start, *_, end in fixed:
        lm.assert_frozen(start, end, RULES)
        for path, before in lm.extract(start, "cell/l[:3]/*").items():
            if np.array_equal(before, lm.extract(end, path)):
                sys.exit(f"error: {path} did not change")
    print(f"\nFixed: l3 kept every bit in {len(fixed)} of {len(fixed)} runs, and all else changed.")
    try:
        lm.assert_frozen(runs["trained"][0][0], runs["trained"][0][-1], RULES)
    except lm.FrozenError as error:
        print(textwrap.fill(f"Trained: {error}.", 100))
    else:
        sys.exit("error: l3 did not learn, where it should")


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("recurrent.png"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + RUNS)
    train, test = tracks(HEARD, options.seed), tracks(HEARD + AHEAD, options.seed + 1)

    params = nnx.state(nnx.RNN(Cell(nnx.Rngs(options.seed))), nnx.Param)
    shapes = jax.eval_shape(LINEN.init, jax.random.key(options.seed), train.inputs)["params"]
    if lm.paths(params) != lm.paths(shapes):
        sys.exit("error: Linen has other paths than NNX")
    show_rules(params)

    runs = {kind: [fit(kind, train, seed) for seed in seeds] for kind in KINDS}
    runs["fixed, in NNX"] = [fit("fixed", train, seed, train_nnx) for seed in seeds]
    states = {name: [states_of(run[-1], test.inputs) for run in runs[name]] for name in runs}
    states["Kalman filter"] = [kalman(test.inputs)]
    errors = {name: np.mean([misses(f, test) for f in states[name]], axis=0) for name in states}
    show_errors(errors, runs)
    show_frozen(runs)

    end = runs["fixed"][0][-1]
    norms = {
        "l3 like any layer": reach(end, test),
        "l3 frozen, by lm.stop_frozen": reach(end, test, rules=RULES),
        "l3's output cut off": reach(end, test, cut="l3"),
    }
    print(
        f"\nNorms of gradients of the error {AHEAD // 2} s ahead; to reach l1 and l2 they come back"
    )
    print(f"through l3 {AHEAD} times:\n\n{'':30}      l1      l2      l3")
    for name, norm in norms.items():
        print("{:30}{:8.2f}{:8.2f}{:8.2f}".format(name, *norm))

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    title = "A tracker whose l3 is physics and keeps every bit; l1 and l2 learn through it"
    figure.suptitle(title, weight="bold", size=14)
    left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1), wspace=0.03)
    panels = left.subplots(), *right.subplots(2, 1)
    draw_tracks(panels[0], test, np.asarray(states["fixed"][0]))
    draw_velocities(panels[1], test, states)
    draw_l3(panels[2], runs)
    for ax in panels:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.output, dpi=100, bbox_inches="tight", pad_inches=0.15)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
