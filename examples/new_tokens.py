"""Teach a language model ten new words by training ten rows of its embedding, and nothing else.

A small transformer learns to continue Python's own documentation: the language reference and the
docstrings of the standard library's modules. Then it meets the packages for concurrency, and words
that it only knows as <unk>. The ten most frequent of them get a row each in the embedding, and two
rules let only these rows learn, under AdamW with weight decay. All other bits are compared before
and after. For comparison, the same optimizer without rules trains everything.

    python examples/new_tokens.py [--output new_tokens.png] [--seed 0]

It needs no network, half a minute of two CPU cores, and ``pip install -e '.[examples]'``.
"""

import argparse
import ast
import collections
import functools
import re
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

import lrmult as lm

WORDS, NEW = 1000, 10  # in the vocabulary; word 0 is <unk>
WIDTH, LENGTH, BATCH = 64, 32, 24
OLD_STEPS, NEW_STEPS, EVERY = 500, 100, 10
PACKAGES = ("asyncio", "concurrent", "multiprocessing")

# The last layer is the first one transposed (tied weights), so one row is all that a word has. On
# an embedding that has not grown yet the slice would select nothing, and that is an error.
RULES = lm.Rules([(lm.rows("embed/embedding", slice(WORDS, None)), 1), (..., None)])
LOSSES = "at the new words", "without the new words", "  if they can come", "on all the new text"
RULED, FREE = "#1f6f8b", "#d55e00"


class Model(nn.Module):
    """A transformer of one block; for each word, how likely every word is to come next."""

    words: int

    @nn.compact
    def __call__(self, tokens):
        """Logits of shape (batch, length, words)."""
        embed = nn.Embed(self.words, WIDTH, name="embed")
        x = embed(tokens) + self.param("position", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        attention = nn.MultiHeadDotProductAttention(4, name="attention")
        x += attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


def docstrings(folder: Path, pattern: str) -> list[str]:
    """The docstrings of all modules, classes and functions."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [n for f in sorted(folder.glob(pattern)) for n in ast.walk(ast.parse(f.read_bytes()))]
    return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]


def split(texts: list[str]) -> list[str]:
    """The words and signs of some texts; a paragraph that comes twice is left out once."""
    paragraphs = dict.fromkeys(part for text in texts for part in re.split(r"\n\s*\n", text))
    return re.findall(r"[a-z_]\w*|\d+|[^\w\s]", "\n".join(paragraphs).lower())


def pieces(words: list[str], names: list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The text in numbers, cut into shuffled pieces; a fifth is for testing."""
    number = {name: i for i, name in enumerate(names)}
    text = np.array([number.get(word, 0) for word in words])
    text = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    test, train = np.split(np.random.default_rng(seed).permutation(text), [len(text) // 5])
    return train, test


@functools.partial(jax.jit, static_argnames="among")
def losses(params, text, among=None):
    """The loss at each word of a text, if only so many words are to choose among."""
    words = len(params["embed"]["embedding"])
    logits = Model(words).apply({"params": params}, text[:, :-1])[..., :among]
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])


gradient = jax.jit(jax.grad(lambda params, text: losses(params, text).mean()))


def fit(params, text: np.ndarray, rules, steps: int, seed: int, measure=lambda params: ()):
    """Train by some rules; give the parameters, and what was measured on the way."""
    rate = optax.warmup_cosine_decay_schedule(0, 5e-3, steps // 10, steps)
    tx = optax.chain(optax.adamw(rate, weight_decay=0.1), lm.scale_by_rules(rules))

    @jax.jit
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, rng, curve = tx.init(params), np.random.default_rng(seed), [measure(params)]
    for step in range(1, steps + 1):
        grads = gradient(params, rng.choice(text, BATCH, replace=False))
        params, state = update(params, state, grads)
        if step % EVERY == 0:
            curve.append(measure(params))
    return params, np.array(curve)


def prove_frozen(plan: lm.Plan, before, after) -> str:
    """Compare bits before and after; end the program unless just what is frozen kept them."""
    trees = (plan.frozen, before, after)
    for leaf, still, *arrays in zip(plan.leaves, *map(jax.tree.leaves, trees), strict=True):
        then, now = (np.asarray(array).view(np.uint32) for array in arrays)
        if ((then == now) != still).any():
            sys.exit(f"error: in {leaf.path} something frozen changed, or something else did not")
    frozen, trained = (sum(getattr(leaf, k) for leaf in plan.leaves) for k in ("frozen", "trained"))
    return f"{frozen:,} frozen numbers kept every bit; the other {trained:,} changed"


def draw_rows(ax, start: np.ndarray, end: np.ndarray, color: str, label: str, note: str) -> None:
    """Draw each row of the embedding as a square, the darker the farther it moved."""
    moved = np.linalg.norm(end - start, axis=1) / np.linalg.norm(start, axis=1)
    squares = np.pad(moved, (0, -len(moved) % 40), constant_values=np.nan).reshape(-1, 40)
    shades = LinearSegmentedColormap.from_list("", ["#e6e6e6", color])
    ax.pcolormesh(squares, cmap=shades, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    ax.text(NEW + 0.5, len(squares) - 0.5, note, va="center", size=9, color="0.3")
    ax.set(aspect="equal", ylim=(len(squares), 0), xticks=[], yticks=[], frame_on=False)
    title = f"Embedding {label}: {np.count_nonzero(moved):,} of {len(moved):,} rows moved"
    ax.set_title(title, size=11, color=color, weight="bold")


def draw_nearest(ax, names: list[str], table: np.ndarray) -> None:
    """Write the nearest old words beside each new one, on cells the darker the nearer."""
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosines = unit[WORDS:] @ unit[:WORDS].T
    order = np.argsort(-cosines, axis=1)[:, :4]
    shades = LinearSegmentedColormap.from_list("", ["white", RULED])
    cells = np.take_along_axis(cosines, order, axis=1)
    ax.imshow(cells, cmap=shades, vmin=0.2, vmax=1, aspect="auto")
    for (i, k), word in np.ndenumerate(order):
        ax.text(k, i, f"{names[word]}\n{cells[i, k]:.2f}", ha="center", va="center", size=9)
    ax.set_yticks(range(NEW), names[WORDS:], weight="bold", color=RULED, size=11)
    ax.tick_params(length=0, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.set_title("Nearest old words, by cosine", size=11, weight="bold")


def draw(path: Path, names: list[str], start, runs: list) -> None:
    """Save the picture of the runs with rules and without."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    title = f"Ten rows learn ten new words; the other {WORDS:,}, and the loss without the new words"
    figure.suptitle(f"{title}, keep every bit", weight="bold", size=13)
    parts = figure.subfigures(1, 3, width_ratios=(1.25, 0.85, 1.1), wspace=0.04)
    squares, charts = (part.subplots(2, 1) for part in parts[:2])
    start, *ends = (np.asarray(p["embed"]["embedding"]) for p in (start, runs[0][0], runs[1][0]))
    notes = ("the ten new words; grey: no bit changed", "darkest: moved by its length or more")
    for k, (color, label) in enumerate(((RULED, "with rules"), (FREE, "without rules"))):
        draw_rows(squares[k], start, ends[k], color, label, notes[k])
        for ax, name, curve in zip(charts, LOSSES, runs[k][1].T, strict=False):
            ax.plot(np.arange(len(curve)) * EVERY, curve, color=color, lw=2.5, label=label)
            ax.set_title(f"Loss {name}", size=11, weight="bold")
            ax.spines[["top", "right"]].set_visible(False)
            ax.legend(frameon=False, labelcolor="linecolor", handlelength=0)
    charts[1].set_xlabel("step")
    draw_nearest(parts[2].subplots(), names, ends[0])
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("new_tokens.png"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seed, library = options.seed, Path(sysconfig.get_path("stdlib"))

    known = split([*topics.values(), *docstrings(library, "*.py")])
    fresh = split([text for name in PACKAGES for text in docstrings(library / name, "**/*.py")])
    names = ["<unk>", *(word for word, _ in collections.Counter(known).most_common(WORDS - 1))]
    counts = collections.Counter(filter(str.isalpha, fresh)).most_common()
    names += [word for word, _ in counts if word not in names][:NEW]
    print(f"{len(known):,} tokens of old text, {len(fresh):,} of new. New:", *names[WORDS:], "\n")
    known, known_test = pieces(known, names, seed)
    fresh, fresh_test = pieces(fresh, names, seed)
    known = np.where(known < WORDS, known, 0)
    without = known_test[(known_test < WORDS).all(axis=1)][: len(fresh_test)]

    model = jax.jit(Model(WORDS).init)(jax.random.key(seed), known[:1, :-1])["params"]
    model, _ = fit(model, known, [], OLD_STEPS, seed)
    # The new rows begin as the mean of the old ones, which takes little probability from them.
    table = jnp.pad(model["embed"]["embedding"], [(0, NEW), (0, 0)], mode="mean")
    start = model | {"embed": {"embedding": table}}
    print(plan := lm.compile_rules(RULES, start), end="\n\n")

    def measure(params) -> list[float]:
        new, kept = losses(params, fresh_test), losses(params, without, among=WORDS)
        at_new = new[fresh_test[:, 1:] >= WORDS]
        return [float(loss.mean()) for loss in (at_new, kept, losses(params, without), new)]

    runs = [fit(start, fresh, rules, NEW_STEPS, seed, measure) for rules in (RULES, [])]
    table = zip(LOSSES, runs[0][1][0], *(curve[-1] for _, curve in runs), strict=True)
    print("Loss, in nats            before   with rules   without rules")
    print(*("{:<22}{:9.4f}{:13.4f}{:16.4f}".format(*row) for row in table), sep="\n", end="\n\n")
    print(prove_frozen(plan, start, runs[0][0]))
    then, now = (np.asarray(losses(p, without, among=WORDS)) for p in (start, runs[0][0]))
    if then.tobytes() != now.tobytes():
        sys.exit("error: with rules, a loss without the new words changed")
    print(f"{then.size:,} losses without the new words kept every bit")
    draw(options.output, names, start, runs)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
