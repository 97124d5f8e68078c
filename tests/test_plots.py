"""`Plan.plot`: the artists hold the plan's numbers."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure

import lrmult as lm


def transformer(layers=12, width=4):
    def dense():
        return {"kernel": jnp.ones((width, width)), "bias": jnp.ones(width)}

    return {
        "embed": jnp.ones((10, width)),
        "encoder": {
            f"layer_{i}": {name: dense() for name in ("attention", "mlp")} for i in range(layers)
        },
        "head": {"kernel": jnp.ones((width, 3)), "bias": jnp.ones(3)},
    }


LAYERS = ["embed", *(f"encoder/layer_{i}" for i in range(12)), "head"]
DECAY = [(f"encoder/layer_{i}", 0.75 ** (12 - i)) for i in range(12)]


def drawn(rules, params, **options):
    """The axes of a picture that has been drawn as a file would be."""
    ax = lm.compile_rules(rules, params).plot(**options)
    ax.get_figure().canvas.draw()
    return ax


def dots_of(ax):
    """(place, multiplier) -> area of the dot."""
    return {
        (place, value): area
        for dots in ax.collections
        if isinstance(dots, PathCollection)
        for (place, value), area in zip(dots.get_offsets().tolist(), dots.get_sizes(), strict=True)
    }


def frozen_of(ax):
    """Per layer, how much of it the band shows as frozen."""
    bars = [bar for bars in ax.containers for bar in bars]
    if not bars:
        return []
    [edge] = [line for line in ax.lines if line.get_transform() == ax.transAxes]
    assert {bar.get_y() for bar in bars} == {0}
    return [bar.get_height() / edge.get_ydata()[0] for bar in bars]


def mesh_of(ax):
    [mesh] = [each for each in ax.collections if isinstance(each, QuadMesh)]
    return mesh


def texts(labels):
    return [label.get_text() for label in labels]


def rates(plan, layer):
    """Multiplier -> share of the parameters of a layer that have it."""
    found, total = {}, 0
    for leaf in plan.leaves:
        if leaf.path == layer or leaf.path.startswith(f"{layer}/"):
            dense = (
                leaf.multiplier.dense() if hasattr(leaf.multiplier, "dense") else leaf.multiplier
            )
            values, counts = np.unique(np.broadcast_to(dense, leaf.shape), return_counts=True)
            total += counts.sum()
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                found[value] = found.get(value, 0) + count
    return {value: count / total for value, count in found.items()}


def check_depth(ax, plan, layers):
    """Every layer has a dot for each of its multipliers, of that area, and its share of frozen."""
    dots, frozen = dots_of(ax), frozen_of(ax) or [0] * len(layers)
    for place, layer in enumerate(layers):
        wanted = rates(plan, layer)
        assert frozen[place] == pytest.approx(wanted.pop(0.0, 0), abs=1e-9)
        assert {value for at, value in dots if at == place} == wanted.keys()
        for value, share in wanted.items():
            assert dots[place, value] == pytest.approx(max(81 * share, 7))


# Along the depth ----------------------------------------------------------------------------------


def test_decay_along_the_depth():
    rules = [("embed", None), ("head", 10), *DECAY]
    plan = lm.compile_rules(rules, transformer())
    ax = drawn(rules, transformer())
    check_depth(ax, plan, LAYERS)
    assert ax.get_yscale() == "log"
    assert texts(ax.get_xticklabels()) == [
        "embed",
        "encoder/layer_0",
        *map(str, range(1, 12)),
        "head",
    ]
    assert texts(ax.get_yticklabels())[0] == "frozen"
    assert {"0.1", "1", "10"} <= {*texts(ax.get_yticklabels())}
    assert ax.get_title(loc="left") == str(plan).splitlines()[-1]
    assert ax.get_ylabel() == "multiplier"
    low, high = ax.get_ylim()
    assert low < 0.75**12 < 10 < high


def test_what_is_mixed():
    rules = [
        ("encoder/layer[:3]/attention", None),
        (lm.neurons("encoder/layer[4:]/mlp", [0]), None),
        (lm.elements("embed", np.eye(10, 4) > 0), 3),
        ("**/bias", 2),
    ]
    plan = lm.compile_rules(rules, transformer())
    ax = drawn(rules, transformer())
    assert rates(plan, "encoder/layer_1") == {0.0: 0.5, 1.0: 0.4, 2.0: 0.1}
    assert len(rates(plan, "embed")) == 2
    check_depth(ax, plan, LAYERS)
    assert ax.get_yscale() == "linear"
    assert texts(ax.get_yticklabels()) == ["frozen", "1", "2", "3"]
    assert "area" in ax.get_ylabel()


def test_negative_multipliers():
    for rules, scale in (
        ([("head", -1), ("embed", None)], "linear"),
        ([("head", -1), ("**/bias", 0.001)], "symlog"),
    ):
        ax = drawn(rules, transformer())
        check_depth(ax, lm.compile_rules(rules, transformer()), LAYERS)
        assert ax.get_yscale() == scale
        colours = {
            value: tuple(dots.get_facecolor()[0])
            for dots in ax.collections
            for _, value in dots.get_offsets().tolist()
        }
        assert colours[-1.0] == to_rgba("C3") != colours[1.0]


def test_the_band_of_what_is_frozen_is_below_all_dots():
    ax = drawn([("embed", None), ("head", 0.01)], transformer())
    [bar, *_] = [bar for bars in ax.containers for bar in bars]
    top = bar.get_window_extent().y1
    assert all(ax.transData.transform(dot)[1] > top for dot in dots_of(ax))


def test_all_frozen_and_nothing_frozen():
    ax = drawn([(..., None)], transformer())
    assert frozen_of(ax) == [1] * 14
    assert dots_of(ax) == {}
    assert texts(ax.get_yticklabels()) == ["frozen"]
    ax = drawn([], transformer())
    assert frozen_of(ax) == []
    assert {value for _, value in dots_of(ax)} == {1.0}
    assert texts(ax.get_yticklabels()) == ["1"]


def test_small_trees():
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(1), "d": jnp.ones(3)}}
    ax = drawn([("a", None), ("b/c", 2)], params)
    assert texts(ax.get_xticklabels()) == ["a", "b/c", "b/d"]
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {0}
    assert dots_of(ax).keys() == {(1, 2.0), (2, 1.0)}
    ax = drawn(0.5, jnp.ones((2, 2)))
    assert dots_of(ax).keys() == {(0, 0.5)}
    assert texts(ax.get_xticklabels()) == ["the array"]
    for params in ({}, {"a": jnp.ones((0, 2))}, {"a": None}):
        drawn([], params)
        drawn([], params, steps=10)


def test_a_thousand_arrays():
    params = transformer(250)
    rules = [("encoder/layer[:100]", None), ("**/bias", 2)]
    plan = lm.compile_rules(rules, params)
    assert len(plan.leaves) > 1000
    ax = drawn(rules, params)
    frozen = frozen_of(ax)
    # Three layers share a place: embed and the first two, then three at a time, the last and head.
    assert len(frozen) == 84
    assert frozen[1:33] == [1] * 32
    assert frozen[33] == pytest.approx(2 / 3)
    assert frozen[34:] == [0] * 50
    assert ax.get_figure().get_figwidth() <= 14
    check_labels_are_apart(ax.get_xticklabels())
    ax = drawn(rules, params, steps=10)
    check_labels_are_apart(ax.get_yticklabels())


def test_unlike_names():
    names = map("".join, itertools.product("bdfgk", "aeiou", "mnrst"))
    params = {name: {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for name in names}
    ax = drawn([("b*", None), ("**/bias", 2)], params)
    assert frozen_of(ax)[:12] == [1] * 12
    assert texts(ax.get_xticklabels())[0] == "bam ... ban"
    check_labels_are_apart(ax.get_xticklabels())


def check_labels_are_apart(labels):
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    assert len(boxes) > 10
    for one, other in itertools.pairwise(boxes):
        assert not one.overlaps(other)


def test_the_order_of_a_structure():
    params = {name: {"w": jnp.ones(2)} for name in ("conv", "early", "head")}
    structure = lm.Structure(order={"": ["early", "conv", "head"]})
    ax = lm.compile_rules([("early", None)], params, structure=structure).plot()
    assert texts(ax.get_xticklabels()) == ["early/w", "conv/w", "head/w"]
    assert frozen_of(ax) == [1, 0, 0]
    params = {"layers": [jnp.ones(1) for _ in range(11)]}  # by their numbers, 10 last
    ax = drawn([("layers[10]", None)], params)
    assert frozen_of(ax) == [0] * 10 + [1]


def test_a_value_that_is_known_at_run_time():
    ax = drawn([("embed", jnp.array(0.3)), ("head", jnp.array(0.0))], transformer())
    assert [value for place, value in dots_of(ax) if place == 0] == [pytest.approx(0.3)]
    assert frozen_of(ax) == [0] * 13 + [1]

    def trace(rate):
        lm.compile_rules([("embed", rate)], transformer()).plot()
        return rate

    with pytest.raises(lm.RuleError, match=r"rule 0 .* known before run time; .* outside jit"):
        jax.jit(trace)(0.1 * jnp.ones(()))


# Over the steps -----------------------------------------------------------------------------------


def test_layers_that_thaw_one_by_one():
    rules = [("embed", None)]
    rules += [(f"encoder/layer_{i}", lm.During(1.0, start=10 * (12 - i))) for i in range(12)]
    ax = drawn(rules, transformer(), steps=150)
    values = mesh_of(ax).get_array()
    assert values.shape == (14, 150)
    assert values.mask[0].all()
    for i in range(12):
        assert values.mask[1 + i].sum() == 10 * (12 - i)
        assert values.mask[1 + i][: 10 * (12 - i)].all()
    assert set(values.compressed().tolist()) == {1.0}
    assert ax.get_ylim() == (14, 0)
    assert texts(ax.get_yticklabels())[:3] == ["embed", "encoder/layer_0", "1"]
    assert texts(ax.get_legend().get_texts()) == ["frozen"]
    assert mesh_of(ax).get_cmap().get_bad().tolist() == list(to_rgba("0.82"))
    assert type(mesh_of(ax).norm) is Normalize
    assert ax.get_xlabel() == "step"


def test_schedules_at_some_steps():
    warm = optax.linear_schedule(0.0, 1.0, 100)
    steps = [0, 10, 50, 200]
    ax = drawn([("embed", warm), ("head", 0.01)], transformer(), steps=steps)
    values = mesh_of(ax).get_array()
    np.testing.assert_allclose(values[0, 1:], [0.1, 0.5, 1.0], rtol=1e-6)
    assert values.mask[0].tolist() == [True, False, False, False]
    np.testing.assert_allclose(values[-1], 0.01)
    assert mesh_of(ax).get_coordinates()[0, :, 0].tolist() == [-5, 5, 30, 125, 205]
    norm = mesh_of(ax).norm
    assert type(norm) is LogNorm
    assert (norm.vmin, norm.vmax) == (0.01, 1.0)


def test_a_mixed_layer_is_split():
    rules = [("**/bias", 0.5), ("encoder/layer[3]", lm.During(2.0, start=5))]
    ax = drawn(rules, transformer(), steps=[0, 9])
    coordinates = mesh_of(ax).get_coordinates()[:, 0, 1]
    values = mesh_of(ax).get_array()
    assert len(values) == 1 + 2 * 13
    assert coordinates[7:10].tolist() == pytest.approx([4, 4.8, 5])  # a fifth are biases
    assert values.filled(0)[7:9].tolist() == [[0, 2.0], [0.5, 0.5]]
    rules = [("encoder/layer[3]/mlp/bias", lm.During(2.0, start=5))]
    ax = drawn(rules, transformer(), steps=[0, 9])
    assert mesh_of(ax).get_coordinates()[4:7, 0, 1].tolist() == pytest.approx([4, 4 + 36 / 40.8, 5])
    assert mesh_of(ax).get_array()[4].tolist() == [1, 1]  # the largest part comes first
    # However small a part is, it shows.
    rules = [(lm.elements("embed", np.arange(40).reshape(10, 4) == 7), lm.During(2.0, start=5))]
    ax = drawn(rules, transformer(), steps=[0, 9])
    assert mesh_of(ax).get_coordinates()[:3, 0, 1].tolist() == pytest.approx([0, 0.975 / 1.095, 1])


def test_schedules_that_look_at_the_step():
    ax = drawn([("embed", lambda step: 0.0 if step < 5 else 1)], transformer(), steps=10)
    assert mesh_of(ax).get_array().mask[0].tolist() == [True] * 5 + [False] * 5
    ax = drawn([("embed", lambda step: 3)], transformer(), steps=2)
    assert mesh_of(ax).get_array()[0].tolist() == [3, 3]


def test_negative_and_faint_multipliers_over_the_steps():
    ax = drawn([("embed", optax.linear_schedule(-1.0, 1.0, 10))], transformer(), steps=11)
    norm = mesh_of(ax).norm
    assert norm.vmin == -norm.vmax == -1.0
    ax = drawn([("embed", lambda step: 10.0**-step)], transformer(), steps=9)
    assert mesh_of(ax).norm.vmin == 1e-4
    assert mesh_of(ax).colorbar.extend == "min"


def test_many_steps_are_sampled():
    ax = drawn([("embed", lambda step: 1.0 + step)], transformer(), steps=100_001)
    values = mesh_of(ax).get_array()
    assert values.shape[1] == 256
    assert (values[0, 0], values[0, -1]) == (1, 100_001)


def test_without_schedules_and_all_frozen():
    ax = drawn([("embed", 2)], transformer(), steps=10)
    assert mesh_of(ax).get_array()[0].tolist() == [2] * 10
    ax = drawn([(..., None)], transformer(), steps=10)
    assert mesh_of(ax).get_array().mask.all()
    assert mesh_of(ax).colorbar is None


# What is said to the caller -----------------------------------------------------------------------


def test_schedules_need_steps():
    plan = lm.compile_rules([("head", 2), ("embed", lm.During(1.0, 5))], transformer())
    with pytest.raises(
        lm.RuleError, match=r"rule 1 \('embed' -> .*\): .* write plot\(steps=1000\)"
    ):
        plan.plot()
    # One that has nothing does not matter.
    rules = lm.optional([("absent", lm.During(1.0, 5))])
    lm.compile_rules(rules, transformer()).plot()


@pytest.mark.parametrize(
    "steps", [0, -1, 1.5, "10", [], [-1, 3], [[1]], [0.5], True, [[1], [1, 2]], iter([1])]
)
def test_what_are_no_steps(steps):
    plan = lm.compile_rules([], transformer())
    with pytest.raises(lm.LrmultError, match=r"steps=.* write steps=1000, or"):
        plan.plot(steps=steps)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        lm.compile_rules([], transformer()).plot()


def test_axes_of_the_caller():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    plan = lm.compile_rules([("embed", None)], transformer())
    assert plan.plot(ax=left) is left
    assert plan.plot(ax=right, steps=5) is right
    assert figure.get_axes()[:2] == [left, right]
    assert len(dots_of(left)) == 13
    assert mesh_of(right).get_array().shape == (14, 5)


def test_pyplot_is_left_alone():
    code = (
        "import sys, lrmult as lm; plan = lm.compile_rules([], {'a': 1.0, 'b': 1.0}); "
        "plan.plot(); plan.plot(steps=3); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
