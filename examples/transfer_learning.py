"""Teach a reader of digits the letters x, y and z by training one new layer.

A LeNet learns the handwritten digits that scikit-learn ships. Its last two layers are dropped, a
new Dense layer and softmax are joined on, and two rules let only the new layer learn. The letters
come from the fonts that matplotlib ships, and whole families of them are held out for the test.
For comparison, the same head is trained as long on frozen trunks that have learnt nothing.

    python examples/transfer_learning.py [--output transfer_learning.png] [--seed 0]

It needs no network, less than a minute of two CPU cores, and ``pip install -e '.[examples]'``.
"""

import argparse
import contextlib
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D, IdentityTransform
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits

import lrmult as lm

# The new layer learns at the full rate, and nothing else learns. It is the last but one, but a tree
# of parameters does not show the softmax after it, so "layers[-2]" would be refused. A number from
# the front is safe: layers without parameters leave a gap in the numbers, and are counted.
RULES = lm.Rules([("layers[9]", 1), (..., None)])
LAYERS = {0: "convolution", 3: "convolution", 7: "dense", 9: "new head"}

CHARACTERS, CLASSES = "xyzXYZ", "xyz"
SEEN_FONTS = [
    *(f"DejaVuSans{style}" for style in ("", "-Oblique", "-Bold", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Oblique", "-Bold", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Italic", "-Bold", "-BoldItalic")),
]
HELD_OUT_FONTS = {
    "STIXGeneral": "STIX roman",
    "STIXGeneralItalic": "STIX italic",
    "STIXGeneralBol": "STIX bold",
    "STIXGeneralBolIta": "STIX bold italic",
    "cmr10": "Computer Modern roman",
    "cmti10": "Computer Modern italic",
    "cmmi10": "Computer Modern math",
    "cmb10": "Computer Modern bold",
    "cmss10": "Computer Modern sans",
    "cmtt10": "Computer Modern mono",
}
FONT_SIZES = (20, 22, 24, 26, 28, 30)  # in pixels
SIDE = 28  # of an image, in pixels
UNITS = 84
BATCH = 48
DIGIT_EPOCHS, LETTER_EPOCHS = 12, 20
RUNS = 5  # of each kind, since an untrained trunk may be lucky
RIGHT, WRONG = "#1f6f8b", "#d1342f"


class Data(NamedTuple):
    """Images of shape (n, SIDE, SIDE, 1), ink from 0 to 1, and their labels."""

    images: np.ndarray
    labels: np.ndarray


class Run(NamedTuple):
    """A trained model, and its arrays by path before and after."""

    model: nnx.Sequential
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


def digits(seed: int) -> tuple[Data, Data]:
    """The digits, enlarged from 8 by 8 pixels; a fifth is for testing."""
    bunch = load_digits()
    large = jax.image.resize(bunch.images / 16, (len(bunch.images), SIDE - 4, SIDE - 4), "cubic")
    images = np.pad(np.clip(large, 0, 1), ((0, 0), (2, 2), (2, 2)))[..., None]
    order = np.random.default_rng(seed).permutation(len(images))
    test, train = np.split(order, [len(order) // 5])
    return Data(images[train], bunch.target[train]), Data(images[test], bunch.target[test])


def letters(fonts: list[str], seed: int) -> Data:
    """Each letter in each font and size, a little off its centre; all drawn on one canvas."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")  # never the fonts of the system
    wanted = list(itertools.product(fonts, FONT_SIZES, CHARACTERS))
    columns = len(FONT_SIZES) * len(CHARACTERS)
    figure = Figure(figsize=(columns * SIDE / 100, len(fonts) * SIDE / 100), dpi=100)
    rng = np.random.default_rng(seed)
    for place, (font, size, character) in enumerate(wanted):
        row, column = divmod(place, columns)
        outline = TextPath(
            (0, 0), character, size, prop=FontProperties(fname=folder / f"{font}.ttf")
        )
        centre = np.mean(outline.get_extents().get_points(), axis=0)
        cell = np.array([column + 0.5, len(fonts) - row - 0.5]) * SIDE
        move = Affine2D().translate(*(cell - centre + rng.uniform(-1.5, 1.5, 2)))
        shape = PathPatch(outline, transform=move + IdentityTransform(), color="black", lw=0)
        figure.add_artist(shape)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ink = 1 - np.asarray(canvas.buffer_rgba())[..., 0] / np.float32(255)
    cells = ink.reshape(len(fonts), SIDE, columns, SIDE).swapaxes(1, 2)
    labels = [CLASSES.index(character.lower()) for _, _, character in wanted]
    return Data(cells.reshape(-1, SIDE, SIDE, 1), np.array(labels))


def pool(x):
    """Halve height and width."""
    return nnx.max_pool(x, (2, 2), (2, 2))


def flatten(x):
    """One vector per image."""
    return x.reshape(len(x), -1)


def lenet(seed: int) -> nnx.Sequential:
    """A LeNet for ten digits."""
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(
        nnx.Conv(1, 6, (5, 5), padding="VALID", rngs=rngs),
        nnx.relu,
        pool,
        nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs),
        nnx.relu,
        pool,
        flatten,
        nnx.Linear(16 * 4 * 4, UNITS, rngs=rngs),
        nnx.relu,
        nnx.Linear(UNITS, 10, rngs=rngs),
        nnx.softmax,
    )


def with_new_head(net: nnx.Sequential, seed: int) -> nnx.Sequential:
    """Drop the last two layers and join a new head on; the trunk is shared, not copied."""
    head = nnx.Linear(UNITS, len(CLASSES), rngs=nnx.Rngs(seed))
    return nnx.Sequential(*net.layers[:-2], head, nnx.softmax)


@nnx.jit
def train_step(model, optimizer, images, labels):
    """One step down the cross-entropy."""

    def loss(model):
        likelihood = jnp.take_along_axis(model(images), labels[:, None], axis=1)
        return -jnp.log(jnp.maximum(likelihood, 1e-7)).mean()  # the model ends in a softmax

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def predict(model, images):
    """The most likely class of each image."""
    return model(images).argmax(axis=-1)


def accuracy(model: nnx.Sequential, data: Data) -> float:
    """The fraction of images that a model reads rightly."""
    return float(np.mean(predict(model, data.images) == data.labels))


def arrays(model: nnx.Sequential) -> dict[str, np.ndarray]:
    """Copies of all arrays of a model, by path."""
    state = nnx.state(model, nnx.Param)
    return dict(zip(lm.paths(state), map(np.array, jax.tree.leaves(state)), strict=True))


def fit(model: nnx.Sequential, data: Data, tx, epochs: int, seed: int, tick) -> Run:
    """Train a model in place, in shuffled batches; `tick` is called after each epoch."""
    before = arrays(model)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    whole = len(data.labels) // BATCH * BATCH
    for _ in range(epochs):
        for batch in rng.permutation(len(data.labels))[:whole].reshape(-1, BATCH):
            train_step(model, optimizer, data.images[batch], data.labels[batch])
        tick()
    return Run(model, before, arrays(model))


@contextlib.contextmanager
def progress_bar(text: str, total: int):
    """Give a function that advances a bar; into a pipe goes one line, at the end."""
    percent = TextColumn("{task.percentage:>3.0f}%")
    with Progress(TextColumn(f"{text:<29}"), BarColumn(), percent, TimeElapsedColumn()) as progress:
        bar = progress.add_task(text, total=total)
        yield lambda: progress.advance(bar)


def learn_digits(data: Data, seed: int) -> Run:
    """Train a LeNet, all of it."""
    with progress_bar("LeNet learns the digits", DIGIT_EPOCHS) as tick:
        return fit(lenet(seed), data, optax.adamw(2e-3), DIGIT_EPOCHS, seed, tick)


def learn_letters(trunks: list[nnx.Sequential], data: Data, seed: int, text: str) -> list[Run]:
    """Train a new head on each trunk, by the rules."""
    tx = optax.chain(optax.adamw(5e-3), lm.scale_by_rules(RULES))
    with progress_bar(text, len(trunks) * LETTER_EPOCHS) as tick:
        return [
            fit(with_new_head(trunk, seed + k), data, tx, LETTER_EPOCHS, seed + k, tick)
            for k, trunk in enumerate(trunks)
        ]


def prove_frozen(plan: lm.Plan, runs: list[Run]) -> str:
    """Compare bytes before and after; end the program unless just what is frozen kept them."""
    kept, size = 0, 0
    for run, leaf in itertools.product(runs, plan.leaves):
        same = run.before[leaf.path].tobytes() == run.after[leaf.path].tobytes()
        if same != (leaf.multiplier == 0):
            sys.exit(f"error: {leaf.path} {'did not learn' if same else 'is frozen, but changed'}")
        if same:
            kept, size = kept + 1, size + run.after[leaf.path].nbytes
    learnt = " and ".join(leaf.path for leaf in plan.leaves if leaf.multiplier)
    return (
        f"Bytes compared before and after each of {len(runs)} runs:\n"
        f"  {kept} of {kept} frozen arrays are identical, all {size:,} bytes\n"
        f"  only {learnt} changed, in every run"
    )


def movement(run: Run, layer: int) -> float:
    """How far a layer moved: the L2 norm of its change over the norm of where it began."""
    names = [path for path in run.before if path.startswith(f"layers/{layer}/")]
    start, end = (np.concatenate([at[n].ravel() for n in names]) for at in (run.before, run.after))
    return float(np.linalg.norm(end - start) / np.linalg.norm(start))


def draw_letters(panel, run: Run, test: Data) -> None:
    """Draw each letter of each held-out font, and what the model takes it for."""
    fonts, sizes, characters = len(HELD_OUT_FONTS), len(FONT_SIZES), len(CHARACTERS)
    row, column = np.indices((fonts, characters))
    size = np.random.default_rng(0).integers(sizes, size=row.shape)  # any, not the easiest
    shown = (row * sizes + size) * characters + column
    images, labels = test.images[shown, ..., 0], test.labels[shown]
    answers = np.asarray(predict(run.model, test.images))[shown]
    grid = panel.subplots(*shown.shape, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for where, ax in np.ndenumerate(grid):
        right = answers[where] == labels[where]
        color = RIGHT if right else WRONG
        image = np.pad(images[where], ((0, 0), (0, 10)))  # room for the answer
        ax.imshow(image, cmap="gray_r" if right else "Reds", vmin=0, vmax=1)
        style = {"color": color, "ha": "center", "va": "center"}
        ax.text(32, 13, CLASSES[answers[where]], style, size=11, weight="bold")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(color="0.85" if right else WRONG, linewidth=0.8 if right else 2)
    for ax, name in zip(grid[:, 0], HELD_OUT_FONTS.values(), strict=True):
        ax.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
    wrong = int(np.sum(answers != labels))
    title = f"Letters in held-out fonts, and what they are taken for: {wrong} of {grid.size} wrong"
    panel.suptitle(title, weight="bold", size=11)


def draw_movement(panel, digits_run: Run, letters_run: Run) -> None:
    """Draw how far each layer moved, first for the digits and then for the letters."""
    ax = panel.subplots()
    for place, layer in enumerate(LAYERS):
        then, now = movement(digits_run, layer), movement(letters_run, layer)
        if now:  # the new head, which did not learn the digits
            ax.barh(place, now, 0.36, color=RIGHT)
            ax.text(now, place, f" letters: {now:.2f}", va="center", color=RIGHT, weight="bold")
            continue
        ax.barh(place - 0.2, then, 0.36, color="0.8")
        ax.text(then, place - 0.2, f" digits: {then:.2f}", va="center", color="0.45")
        ax.text(0, place + 0.2, " letters: 0, frozen", va="center", color=RIGHT, weight="bold")
    ax.set_yticks(range(len(LAYERS)), [f"layers[{k}]\n{name}" for k, name in LAYERS.items()])
    ax.set(ylim=(len(LAYERS) - 0.5, -0.5), xticks=[])
    ax.margins(x=0.3)
    ax.tick_params(length=0)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    panel.suptitle("How far each layer moved: |change| / |start|", weight="bold", size=11)


def draw(path: Path, digits_run: Run, letters_run: Run, test: Data) -> None:
    """Save the picture."""
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.6, 1), wspace=0.04)
    draw_letters(left, letters_run, test)
    draw_movement(right, digits_run, letters_run)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("transfer_learning.png"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seed = options.seed

    train, test = digits(seed)
    reader = learn_digits(train, seed)
    print(f"Accuracy on {len(test.labels)} digits held out: {accuracy(reader.model, test):.1%}\n")
    plan = lm.compile_rules(RULES, nnx.state(with_new_head(reader.model, seed), nnx.Param))
    print("The plan for the letters:\n", plan, sep="\n", end="\n\n")

    train, test = letters(SEEN_FONTS, seed), letters(list(HELD_OUT_FONTS), seed + 1)
    same, fresh = [reader.model] * RUNS, [lenet(seed + 1 + k) for k in range(RUNS)]
    trained = learn_letters(same, train, seed, "New heads, trained trunk")
    untrained = learn_letters(fresh, train, seed, "New heads, untrained trunks")
    print(f"\nAccuracy on {len(test.labels)} letters in held-out fonts, mean of {RUNS} runs:")
    for name, runs in (("trained", trained), ("untrained", untrained)):
        found = [accuracy(run.model, test) for run in runs]
        print(f"  {name:>9} trunk {np.mean(found):.1%} ({min(found):.1%} to {max(found):.1%})")
    print("", prove_frozen(plan, trained + untrained), sep="\n")
    draw(options.output, reader, trained[0], test)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
