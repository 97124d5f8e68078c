"""A plan as a picture: multipliers along the depth of a model, or over the steps of training."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from lrmult._claims import claiming_rules
from lrmult._errors import LrmultError, RuleError, shorten, show
from lrmult._folding import in_natural_order
from lrmult._multipliers import Multiplier, is_array, is_schedule
from lrmult._paths import ParamTree
from lrmult._plan import Plan
from lrmult._positions import split_number
from lrmult._report import totals
from lrmult._rules import name_rule

Axes: TypeAlias = Any  # of matplotlib, which is imported only when something is drawn
Floats: TypeAlias = npt.NDArray[np.float64]

_FEW_LAYERS = 12  # with fewer, one looks deeper into the tree
_MOST_LAYERS = 100  # where there are more, neighbours share a place
_MOST_STEPS = 256  # columns of a picture
_FROZEN = "0.82"  # a grey that is no colour of the map
_BAND = 0.14  # of the height of the axes, for what is frozen
_THINNEST = 0.12  # of the height of a layer, for any part of it
_FAINTEST = 1e-4  # of the largest multiplier; what is smaller has one colour
_MOST_SEPARATE = 40  # layers, for white lines to be drawn between them
_SMALL = 8  # points
_LINE, _LETTER = 0.14, 0.07  # inches, of small text


class _Share(NamedTuple):
    """Parameters of one layer that have one multiplier at every step."""

    part: float  # of the layer's parameters
    values: Floats  # by step; 0 is frozen


class _Layer(NamedTuple):
    """Arrays that stand at one place along the depth of a model."""

    label: str
    number: int | None  # of a layer that follows one of the same name, with the number before
    shares: list[_Share]  # the largest first


def plot(plan: Plan, steps: int | Sequence[int] | None, ax: Axes | None) -> Axes:
    """Draw a plan; see `Plan.plot`."""
    figure_class = _figure_class()
    at = None if steps is None else _read_steps(steps)
    layers = _layers(plan, _values(plan, at))
    if ax is None:
        longest = max([len(layer.label) for layer in layers], default=0)
        size = min(max(3 + 0.26 * len(layers), 6.4), 14), 3.2 + _LETTER * longest
        if at is not None:
            size = 8, min(max(2 + 0.2 * len(layers), 2.8), 11)
        ax = figure_class(figsize=size, layout="constrained").add_subplot()
    if at is None:
        _draw_depth(ax, layers)
    else:
        _draw_steps(ax, layers, at)
    ax.set_title(totals(plan), loc="left", fontsize="medium")
    return ax


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plan is drawn by matplotlib; pip install matplotlib") from error
    return Figure


def _read_steps(steps: int | Sequence[int]) -> npt.NDArray[np.int64]:
    """The steps to draw: those of a sequence, or some from 0 up to a number of them."""
    wrong = LrmultError(
        f"steps={show(steps)} is neither a number of steps nor a sequence of them; write "
        "steps=1000, or steps=range(0, 1000, 10)"
    )
    try:
        read = np.asarray(steps)
    except ValueError:
        raise wrong from None
    if not np.issubdtype(read.dtype, np.integer) or read.ndim > 1 or not read.size:
        raise wrong
    if read.ndim == 0:
        read = np.linspace(0, read - 1, min(max(int(read), 0), _MOST_STEPS)).round().astype(int)
    read = np.unique(read)
    if not read.size or read[0] < 0:
        raise wrong
    return read


# ---- what there is to draw


def _values(plan: Plan, steps: npt.NDArray[np.int64] | None) -> dict[int | None, Floats]:
    """By rule, and None for no rule, the multiplier at each step; without steps, one value."""
    found: dict[int | None, Floats] = {None: np.ones(1 if steps is None else len(steps))}
    for rule in claiming_rules(plan.claims):
        if rule is None:
            continue
        try:
            value = _value(plan.rules[rule].multiplier, steps)
        except RuleError as error:
            raise RuleError(f"{name_rule(rule, *plan.rules[rule])}: {error}") from None
        found[rule] = np.broadcast_to(value, found[None].shape)
    return found


def _value(multiplier: Multiplier, steps: npt.NDArray[np.int64] | None) -> Any:
    if multiplier is None or isinstance(multiplier, float):
        return multiplier or 0.0
    if is_array(multiplier) and not isinstance(multiplier, jax.core.Tracer):
        return float(multiplier)
    if not is_schedule(multiplier):
        raise RuleError("its multiplier is not known before run time; draw the plan outside jit")
    if steps is None:
        raise RuleError("its multiplier depends on the step; write plot(steps=1000) or the like")
    try:
        return np.asarray(jax.vmap(multiplier)(jnp.asarray(steps)), float)
    except TypeError:  # it looks at the value of the step
        return np.asarray([float(multiplier(step)) for step in steps.tolist()])


def _layers(plan: Plan, values: dict[int | None, Floats]) -> list[_Layer]:
    """The layers of a model in order, each with its multipliers."""
    tree = plan.tree
    below = _arrays_below(tree)
    nodes = _cut(tree, below)
    together = math.ceil(len(nodes) / _MOST_LAYERS)
    layers: list[_Layer] = []
    before: tuple[int, str, int] | None = None
    for start in range(0, len(nodes), together or 1):
        group = nodes[start : start + together]
        leaves = [leaf for node in group for leaf in below[node]]
        ends = dict.fromkeys(tree.text(node) or "the array" for node in (group[0], group[-1]))
        stem, number = split_number(tree.names[group[0]]) or ("", None)
        place = tree.parents[group[0]], stem, number or 0
        follows = number is not None and before == (*place[:2], place[2] - together)
        before = place if number is not None else None
        label = str(number) if follows else shorten(" ... ".join(ends), 40)
        layers.append(_Layer(label, number if follows else None, _shares(plan, leaves, values)))
    return layers


def _arrays_below(tree: ParamTree) -> dict[int, list[int]]:
    """For each node that holds arrays, these."""
    below = {node: [leaf] for leaf, node in tree.arrays()}
    for node in reversed(tree.nodes):
        held = [below[child] for child in tree.children[node].values() if child in below]
        if held:
            below[node] = [leaf for leaves in held for leaf in leaves]
    return below


def _cut(tree: ParamTree, below: dict[int, list[int]]) -> list[int]:
    """Nodes that together hold all arrays, as far up in the tree as gives more than a few."""

    def expanded(node: int) -> Iterable[int]:
        children = tree.children[node]
        given = [name for name in tree.order.get(node, ()) if name in children]
        names = dict.fromkeys([*given, *in_natural_order(children)])
        return (children[name] for name in names if children[name] in below)

    nodes = [0] if below else []
    while len(nodes) < _FEW_LAYERS:
        # The arrays of one layer are told apart only if there is nothing else to tell apart.
        inner = {n for n in nodes if any(tree.children[c] for c in tree.children[n].values())}
        inner = inner or {node for node in nodes if tree.children[node]}
        if not inner:
            break
        nodes = [n for node in nodes for n in (expanded(node) if node in inner else (node,))]
    return nodes


def _shares(plan: Plan, leaves: list[int], values: dict[int | None, Floats]) -> list[_Share]:
    counts: dict[bytes, int] = {}
    for leaf in leaves:
        size = math.prod(plan.shapes[leaf])
        for piece in plan.claims[leaf]:
            key = values[piece.rule].tobytes()
            counts[key] = counts.get(key, 0) + (size if piece.count is None else piece.count)
    total = max(sum(counts.values()), 1)
    shares = [_Share(count / total, np.frombuffer(key)) for key, count in counts.items()]
    return sorted(shares, key=lambda share: -share.part)


# ---- along the depth


def _draw_depth(ax: Axes, layers: list[_Layer]) -> None:
    """Draw a dot for each multiplier of each layer, and below how much of the layer is frozen."""
    ax.set_xlim(-0.8, max(len(layers), 1) - 0.2)
    dots = [
        (place, float(share.values[0]), share.part)
        for place, layer in enumerate(layers)
        for share in layer.shares
        if share.values[0]
    ]
    frozen = [sum(s.part for s in layer.shares if not s.values[0]) for layer in layers]
    band = (_BAND if dots else 1.0) if any(frozen) else 0.0
    _scale_values(ax, sorted({value for _, value, _ in dots}), band)
    room = _room(ax, "width", layers)
    largest = min(max(0.8 * 72 * room, 3.0), 9.0)  # points
    for colour, sign in (("C0", 1), ("C3", -1)):
        chosen = [dot for dot in dots if dot[1] * sign > 0]
        if chosen:
            places, values, parts = zip(*chosen, strict=True)
            areas = [max(part * largest**2, 7.0) for part in parts]
            ax.scatter(places, values, areas, color=colour, linewidths=0, zorder=3)
    if band:
        _draw_band(ax, frozen, band)
    mixed = any(len(layer.shares) > 1 for layer in layers)
    ax.set_ylabel("multiplier" + "\n(area: share of the layer)" * mixed)
    labels = _labels(layers, room)
    nearest = min(np.diff([*sorted(labels)]), default=1)
    upright = max(map(len, labels.values()), default=0) * _LETTER > nearest * room
    ax.set_xticks([*labels], [*labels.values()], rotation=90 * upright, fontsize=_SMALL)


def _scale_values(ax: Axes, values: list[float], band: float) -> None:
    """Choose scale and ticks for some multipliers, above a band of that part of the height."""
    sizes = [abs(value) for value in values] or [1.0]
    if max(sizes) >= 10 * min(sizes):
        if values[0] > 0:
            ax.set_yscale("log")
        else:
            ax.set_yscale("symlog", linthresh=min(sizes))
    transform = ax.yaxis.get_transform()
    lowest, highest = transform.transform(np.array([values[0], values[-1]] if values else [0, 1]))
    margin = 0.08 * (highest - lowest) or 0.5
    low, high = lowest - margin, highest + margin
    if values:
        low -= (high - low) * band / (1 - band)
    middle = low + (high - low) * band / 2
    low, middle, high = transform.inverted().transform(np.array([low, middle, high])).tolist()
    ax.set_ylim(low, high)
    ticks = _value_ticks(ax, values)
    ax.set_yticks([middle] * bool(band) + ticks, ["frozen"] * bool(band) + [*map(_text, ticks)])
    ax.minorticks_off()
    for tick in ticks:
        ax.axhline(tick, color="0.5", alpha=0.3, linewidth=0.8, zorder=0)


def _value_ticks(ax: Axes, values: list[float]) -> list[float]:
    """The multipliers themselves if they are few and stand apart, else round numbers."""
    from matplotlib.ticker import LogLocator

    transform = ax.yaxis.get_transform()
    bottom, top = transform.transform(np.array(ax.get_ylim()))
    gaps = np.diff(transform.transform(np.array(values))) / (top - bottom)
    if len(values) < 8 and (gaps > 0.05).all():
        return values
    locator = ax.yaxis.get_major_locator()
    if ax.get_yscale() == "log" and values[-1] < 1000 * values[0]:
        locator = LogLocator(subs=(1, 2, 5))
    ticks = locator.tick_values(values[0], values[-1])
    return [float(tick) for tick in ticks if values[0] <= tick <= values[-1]]


def _text(value: float) -> str:
    return f"{value:.3g}"


def _draw_band(ax: Axes, frozen: list[float], band: float) -> None:
    """Draw how much of each layer is frozen, as bars in a band at the bottom of the axes."""
    ax.plot([0, 1], [band, band], transform=ax.transAxes, color="0.6", linewidth=0.8)
    ax.bar(
        range(len(frozen)),
        [band * part for part in frozen],
        width=0.9,
        color=_FROZEN,
        edgecolor="0.5",
        hatch="////",
        linewidth=0,
        transform=ax.get_xaxis_transform(),
    )


def _room(ax: Axes, side: str, layers: list[_Layer]) -> float:
    """How many inches each layer has along a side of the axes."""
    pixels = getattr(ax.get_window_extent(), side)
    return float(pixels / ax.get_figure().dpi / max(len(layers), 1))


def _labels(layers: list[_Layer], room: float) -> dict[int, str]:
    """What to write at which places; where all have no room, round numbers and some others."""
    apart = math.ceil(_LINE / room)
    every = next((step for step in (1, 2, 5, 10, 20, 50) if step >= apart), 100)
    follows = [layer.number is not None for layer in layers]
    # First those that say what the numbers after them are of.
    first = [place for place, (one, next_) in enumerate(itertools.pairwise(follows)) if next_ > one]
    others = [place for place, follow in enumerate(follows) if not follow]
    numbers = [place for place, layer in enumerate(layers) if (layer.number or 1) % every == 0]
    found: list[int] = []
    for place in (*first, *others, *numbers):
        if all(abs(place - other) >= apart for other in found):
            found.append(place)
    return {place: layers[place].label for place in sorted(found)}


# ---- over the steps


def _draw_steps(ax: Axes, layers: list[_Layer], steps: npt.NDArray[np.int64]) -> None:
    """Draw a line for each layer, coloured by its multipliers; a mixed layer is split in height."""
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    edges, lines = [0.0], []
    for place, layer in enumerate(layers):
        parts = np.array([max(share.part, _THINNEST) for share in layer.shares])
        edges += (place + np.cumsum(parts) / parts.sum()).tolist()
        lines += [share.values for share in layer.shares]
    values = np.ma.masked_equal(np.array(lines).reshape(len(lines), len(steps)), 0)
    colours, norm, extend = _colours(values.compressed())
    mesh = ax.pcolormesh(_edges(steps), edges, values, cmap=colours, norm=norm)
    ax.set_ylim(max(len(layers), 1), 0)
    if len(layers) <= _MOST_SEPARATE:
        for place in range(1, len(layers)):
            ax.axhline(place, color=ax.get_facecolor(), linewidth=0.8)
    room = _room(ax, "height", layers)
    if values.count():
        slim = room * len(layers) / 0.2  # inches
        ax.get_figure().colorbar(mesh, ax=ax, label="multiplier", extend=extend, aspect=slim)
    if values.count() < values.size:
        patch = Patch(facecolor=_FROZEN, label="frozen")
        ax.legend(  # below the axes, beside what is written there
            handles=[patch],
            loc="upper right",
            bbox_to_anchor=(1, 0),
            borderaxespad=2.2,
            frameon=False,
        )
    labels = _labels(layers, room)
    ax.set_yticks([place + 0.5 for place in labels], [*labels.values()], fontsize=_SMALL)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("step")


def _edges(steps: npt.NDArray[np.int64]) -> Floats:
    """Where the columns of some steps meet, and where they end."""
    half = np.diff(steps).min(initial=1 if len(steps) < 2 else steps[-1]) / 2
    return np.array([steps[0] - half, *(steps[1:] + steps[:-1]) / 2, steps[-1] + half])


def _colours(values: Floats) -> tuple[Any, Any, str]:
    """The colours for some multipliers, their scale, and the ends at which there are more."""
    from matplotlib import colormaps, colors

    sizes = np.abs(values) if values.size else np.ones(1)
    smallest, largest = float(sizes.min()), float(sizes.max())
    least = max(smallest, largest * _FAINTEST)
    many = largest >= 10 * smallest
    norm: Any
    if (values < 0).any():
        norm = colors.CenteredNorm(halfrange=largest)
        if many:
            norm = colors.SymLogNorm(least, vmin=-largest, vmax=largest)
        return colormaps["PuOr_r"].with_extremes(bad=_FROZEN), norm, "neither"
    norm = colors.LogNorm(least, largest) if many else colors.Normalize(0, largest)
    extend = "min" if least > smallest else "neither"
    return colormaps["viridis"].with_extremes(bad=_FROZEN), norm, extend
