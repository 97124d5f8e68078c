"""Thaw a network from the top, layer by layer, and keep what the optimizer has learned.

A small network learns the handwritten digits 0 to 4 that scikit-learn ships. Then it gets a new
head and learns 5 to 9 from ten images of each, as in ULMFiT (Howard and Ruder, 2018): first the
head alone, then the layer below it too, and so on. `lrmult.wrap` keeps no moments of Adam for what
is frozen, and at each thaw `lrmult.migrate` carries over those of what trains. For comparison, Adam
starts anew at each thaw; and everything trains from the start.

    python examples/gradual_unfreezing.py [--output gradual_unfreezing.png] [--seed 0]

It needs no network, half a minute of two CPU cores, and ``pip install -e '.[examples]'``.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import lrmult as lm

LAYERS, WIDTH, CLASSES = 4, 64, 5
SHOTS, BATCH, RUNS = 10, 16, 10
BEGINS, END = (0, 100, 200, 300), 600  # the steps at which stages begin; the last stage is longest
EVERY, AFTER = 5, 20  # steps from one look at held-out images to the next; steps after a thaw
RATE, B1, B2 = 1e-3, 0.9, 0.999
ADAM, PRETRAIN = optax.adam(RATE, B1, B2), optax.adam(2e-3)


def own_bias(begin: int) -> optax.Schedule:
    """A multiplier that corrects the bias of Adam's moments for a layer that thaws at a step.

    Adam has one count, which goes on, and by which it tells how much moments still lack. Those of a
    layer that has just thawed lack more. Without this, constant gradients would move a layer that
    thaws late by up to 6.6 learning rates a step. With it, but for Adam's small epsilon, a layer
    learns as by an Adam of its own that starts when it thaws.
    """

    def schedule(step):
        count, own = step + 1.0, jnp.maximum(step - begin, 0) + 1.0
        first, second = ((1 - decay**own) / (1 - decay**count) for decay in (B1, B2))
        return jnp.sqrt(second) / first

    return schedule


def stages(*found: list) -> list:
    """The rules of each stage, and the optimizer that they wrap."""
    return [(rules, lm.wrap(ADAM, rules)) for rules in found]


TOPS = range(1, LAYERS + 1)  # how many layers train in each stage
PLAIN = stages(*([(f"layers[-{top}:]", 1), (..., None)] for top in TOPS))
# The head has a schedule too, so that the step that schedules see counts from the first stage on.
EACH = [(f"layers[-{k + 1}]", own_bias(begin)) for k, begin in enumerate(BEGINS)]
OWN = stages(*([*EACH[:top], (..., None)] for top in TOPS))
WAYS = {"migrate": OWN, "restart": PLAIN, "without own_bias": PLAIN, "all at once": stages([])}
COLORS = dict(zip(WAYS, ("#1f6f8b", "#d55e00", "#56b4e9", "0.6"), strict=True))
BOLD = {"weight": "bold", "size": 11}

Data = tuple[np.ndarray, np.ndarray]  # images as rows of 64 pixels, and labels from 0 to 4


class Net(nn.Module):
    """Three hidden layers, and a head that tells five classes."""

    def setup(self):
        """Make layers_0 to layers_3."""
        self.layers = [nn.Dense(WIDTH) for _ in range(LAYERS - 1)] + [nn.Dense(CLASSES)]

    def __call__(self, x):
        """Five logits for each image."""
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


def measure(params, images, labels):
    """The mean cross-entropy in nats, and the fraction that is read rightly."""
    logits = Net().apply({"params": params}, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(-1) == labels).mean()


def size(tree):
    """The root mean square of the numbers in a tree."""
    return jnp.sqrt(jnp.mean(jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) ** 2))


def bytes_of(tree) -> int:
    """The bytes of all arrays in a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=0)
def train(tx, params, state, batches, data: Data, test: Data):
    """Train on batches, given as numbers of images; note losses, and how far layers move."""

    def step(carry, batch):
        params, state = carry
        grads, _ = jax.grad(measure, has_aux=True)(params, data[0][batch], data[1][batch])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        moved = jnp.stack([size(updates[f"layers_{k}"]) / RATE for k in range(LAYERS)])
        return (params, state), (measure(params, *data)[0], moved)

    def steps(carry, batches):
        carry, (loss, moved) = jax.lax.scan(step, carry, batches)
        held_out, right = measure(carry[0], *test)
        return carry, {"training": loss, "moved": moved, "held-out": held_out, "right": right}

    batches = batches.reshape(-1, EVERY, batches.shape[-1])
    (params, state), notes = jax.lax.scan(steps, (params, state), batches)
    return params, state, notes | {k: jnp.concatenate(notes[k]) for k in ("training", "moved")}


@jax.jit
def initial(seed):
    """A network that has learned nothing."""
    return Net().init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]


def pretrained(seed: int, data: Data):
    """A network that has learned to read 0 to 4, with a new head."""
    model, fresh = initial(seed), initial(~seed)
    batches = np.random.default_rng(seed).integers(len(data[0]), size=(200, 64))
    model, _, _ = train(PRETRAIN, model, PRETRAIN.init(model), batches, data, data)
    return model | {"layers_3": fresh["layers_3"]}


def check_carried(before, after) -> None:
    """End the program unless migrating kept every bit of a state, and began the rest with zeros."""
    then, now = (dict(jax.tree.leaves_with_path(state)) for state in (before, after))
    for path, array in now.items():
        if np.asarray(array).tobytes() != np.asarray(then.pop(path, 0 * array)).tobytes():
            sys.exit(f"error: {jax.tree_util.keystr(path)} was not carried over")
    if then:
        sys.exit(f"error: migrating lost {len(then)} arrays")


def fit(way: str, params, batches, data: Data, test: Data):
    """Train in one of the ways; give what was noted, and the bytes that Adam keeps in each stage.

    That frozen parameters keep every bit is checked in each stage, and so is what is carried over.
    """
    notes, nbytes, state, old_rules = [], [], None, None
    ends = [*BEGINS[1:], END] if len(WAYS[way]) > 1 else [END]
    for (rules, tx), begin, end in zip(WAYS[way], BEGINS, ends, strict=False):
        before, old = params, state
        if old is None or way == "restart":
            state = tx.init(params)
        else:
            state = lm.migrate(old, params, ADAM, old_rules, rules)
            check_carried(old, state)
        nbytes.append(bytes_of(state.inner_state))
        params, state, seen = train(tx, params, state, batches[begin:end], data, test)
        lm.assert_frozen(before, params, rules)
        notes.append(seen)
        old_rules = rules
    return jax.tree.map(lambda *parts: np.concatenate(parts), *notes), nbytes


def experiment(seed: int, images: np.ndarray, labels: np.ndarray) -> dict:
    """Train in all ways, from the same network, on the same batches."""
    old, rng = labels < CLASSES, np.random.default_rng(seed)
    start = pretrained(seed, (images[old], labels[old]))
    new = [rng.permutation(np.flatnonzero(labels == CLASSES + k)) for k in range(CLASSES)]
    parts = np.concatenate([c[:SHOTS] for c in new]), np.concatenate([c[SHOTS:] for c in new])
    data, test = ((images[part], labels[part] - CLASSES) for part in parts)
    batches = np.stack([rng.permutation(len(data[0]))[:BATCH] for _ in range(END)])
    return {way: fit(way, start, batches, data, test) for way in WAYS}


def rise(notes: dict, begin: int) -> float:
    """How far above its value before a thaw the training loss gets after it, as a fraction."""
    loss = notes["training"]
    return (loss[:, begin : begin + AFTER].max(axis=1) / loss[:, begin - 1]).mean() - 1


def report(found: dict) -> None:
    """Print what came out; end the program unless restarting is what shakes the network."""
    print(
        f"At each thaw: how far above its value before the training loss gets in {AFTER} steps, and"
    )
    print("how far the first step moves the head, in learning rates. In the end: the loss in")
    print(f"training and held out, and the accuracy held out. Means of {RUNS} runs:\n")
    print(f"{'':16}{'loss at thaws':^24}{'head at thaws':^18}  training  held-out  accuracy")
    shaken = {}
    for way, notes in found.items():
        first = notes["moved"][:, BEGINS[1:], -1].mean(axis=0)
        shaken[way] = [rise(notes, begin) for begin in BEGINS[1:]], first
        end = [notes[key][:, -1].mean() for key in ("training", "held-out", "right")]
        form = "{:16}" + "{:+8.1%}" * 3 + "{:6.2f}" * 3 + "{:10.4f}{:10.4f}{:10.1%}"
        print(form.format(way, *shaken[way][0], *first, *end))
    (rises, first), (rises_anew, first_anew) = shaken["migrate"], shaken["restart"]
    if sum(rises_anew) <= sum(rises) or (first_anew < 2 * first).any():
        sys.exit("error: restarting does not shake what trains")
    print("\nRestart less migrate, in pairs from the same start, with standard errors:")
    for key, name, unit in (("held-out", "held-out loss", 1), ("right", "accuracy in points", 100)):
        pairs = (found["restart"][key] - found["migrate"][key])[:, -1] * unit
        print(f"  {name} {pairs.mean():+.3f} +- {pairs.std(ddof=1) / RUNS**0.5:.3f}")


def draw_stages(ax, nbytes: list[int]) -> None:
    """Draw which layer trains when, and how much Adam keeps."""
    ax.text(-8, LAYERS - 0.2, "Adam keeps", ha="right", va="center")
    for k, (begin, end) in enumerate(zip(BEGINS, (*BEGINS[1:], END), strict=True)):
        row = LAYERS - 1 - k
        ax.barh(row, begin, 0.8, color="0.92")
        ax.barh(row, END - begin, 0.8, begin, color=COLORS["migrate"])
        ax.text(begin + 6, row, "trains", color="white", va="center", weight="bold")
        ax.text(6, row, "frozen" if k else "", color="0.4", va="center")
        ax.text((begin + end) / 2, LAYERS - 0.2, f"{nbytes[k]:,} B", ha="center", va="center")
    ax.set_yticks(range(LAYERS), ["layers[0]", "layers[1]", "layers[2]", "layers[3],\nthe head"])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_ylim(-0.5, LAYERS + 0.2)
    ax.set_title("What trains when, and the state of Adam", **BOLD)


def draw_lines(ax, found: dict, ways: list[str], key: str, layer: int | None = None) -> None:
    """Draw something over the steps: the mean of the runs, and between which the middle half is."""
    for way in ways:
        values = found[way][key] if layer is None else found[way][key][..., layer]
        steps = np.linspace(0, END, values.shape[1] + 1)[1:]
        low, high = np.quantile(values, (0.25, 0.75), axis=0)
        ax.fill_between(steps, low, high, color=COLORS[way], alpha=0.15, lw=0)
        ax.plot(steps, values.mean(axis=0), color=COLORS[way], lw=2, label=way)
    for begin in BEGINS[1:]:
        ax.axvline(begin, color="0.7", lw=1, ls=":", zorder=0)
    ax.legend(frameon=False, labelcolor="linecolor", handlelength=0, loc="upper right")


def draw_thaw(ax, found: dict, begin: int) -> None:
    """Draw the training loss of all runs around a thaw, against that just before it."""
    around = np.arange(-AFTER // 2, AFTER + 1)
    for way in ("restart", "migrate"):
        loss = found[way]["training"]
        near = loss[:, begin - 1 + around] / loss[:, [begin - 1]]
        ax.plot(begin + around, near.T, color=COLORS[way], lw=0.7, alpha=0.5)
        ax.plot(begin + around, near.mean(axis=0), color=COLORS[way], lw=3, label=way)
    ax.axvline(begin, color="0.7", lw=1, ls=":", zorder=0)
    ax.legend(frameon=False, labelcolor="linecolor", handlelength=0, loc="upper right")


def draw(path: Path, found: dict, nbytes: list[int]) -> None:
    """Save the picture."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    title = "Thawed from the top: with migrate, what trains goes on; a restart of Adam shakes it"
    figure.suptitle(title, weight="bold", size=14)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1), wspace=0.03)
    top, *losses = left.subplots(3, 1, sharex=True)
    head, thawed, zoom = right.subplots(3, 1)
    draw_stages(top, nbytes)
    for ax, key in zip(losses, ("training", "held-out"), strict=True):
        draw_lines(ax, found, ["all at once", "restart", "migrate"], key)
        ax.set(yscale="log", xlim=(0, END))
        ax.set_title(f"{key.capitalize()} loss", **BOLD)
    losses[1].set_yticks([0.3, 0.5, 1, 2], ["0.3", "0.5", "1", "2"], minor=False)
    losses[1].tick_params(which="minor", labelleft=False)
    draw_lines(head, found, ["restart", "migrate"], "moved", LAYERS - 1)
    head.set_title("How far each step moves the head, in learning rates", **BOLD)
    draw_lines(thawed, found, ["without own_bias", "migrate"], "moved", 0)
    thawed.set(xlim=(BEGINS[-1] - AFTER, BEGINS[-1] + 5 * AFTER))
    thawed.set_title("The same of layers[0], which thaws last", **BOLD)
    draw_thaw(zoom, found, BEGINS[-1])
    zoom.set_title("Training loss around the last thaw, over that just before", **BOLD)
    for ax in (losses[1], zoom):
        ax.set_xlabel("step")
    for ax in (*losses, head, thawed, zoom):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gradual_unfreezing.png"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bunch = load_digits()
    images, labels = (bunch.data / 16).astype(np.float32), bunch.target

    params = initial(options.seed)
    print("The plan of the second stage:\n", lm.compile_rules(OWN[1][0], params), sep="\n")
    runs = [experiment(options.seed + k, images, labels) for k in range(RUNS)]
    full = bytes_of(ADAM.init(params))
    nbytes = runs[0]["migrate"][1]
    if nbytes != sorted(set(nbytes)) or nbytes[-1] != full:
        sys.exit(f"error: by stages Adam keeps {nbytes} bytes, and {full} if nothing is frozen")
    print(
        f"\nBytes that Adam keeps, by stage: {', '.join(f'{n:,}' for n in nbytes)}; all: {full:,}"
    )
    print(f"In {RUNS} runs of each way, what was frozen in a stage kept every bit; and so did, at")
    print("each migration, Adam's count and the moments of what trained before.\n")
    found = {}
    for way in WAYS:
        found[way] = jax.tree.map(lambda *each: np.stack(each), *(run[way][0] for run in runs))
    report(found)
    draw(options.output, found, nbytes)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
