"""Recipes give what their formulas say, for models of every library, and refuse all else."""

import fractions
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import lrmult as lm
from lrmult import recipes
from tests.test_reference import cases
from tests.trees import tree_of

# ---- models, and by hand the depth of each of their arrays --------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.LayerNorm()(x))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4, name="embed")(tokens)
        for i in range(3):
            x = LinenBlock(name=f"block_{i}")(x)
        x = nn.BatchNorm(use_running_average=True)(nn.GroupNorm(2)(nn.RMSNorm()(x)))
        return nn.Dense(2, name="head")(nn.LayerNorm(use_bias=False, name="final")(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.fc = nnx.Linear(4, 4, rngs=rngs)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(3)])
        self.first = nnx.BatchNorm(4, rngs=rngs)
        self.second = nnx.GroupNorm(4, 2, rngs=rngs)
        self.third = nnx.RMSNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)


class EqxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    fc: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(4)
        self.fc = eqx.nn.Linear(4, 4, key=key)


class EqxNet(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list
    square: eqx.nn.LayerNorm
    group: eqx.nn.GroupNorm
    root: eqx.nn.RMSNorm
    plain: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(5, 4, key=key)
        self.blocks = [EqxBlock(key) for _ in range(3)]
        self.square = eqx.nn.LayerNorm((3, 4))
        self.group = eqx.nn.GroupNorm(2, 4)
        self.root = eqx.nn.RMSNorm(4)
        self.plain = eqx.nn.RMSNorm(4, use_bias=False)
        self.head = eqx.nn.Linear(4, 2, key=key)


def haiku_net(tokens):
    x = hk.Embed(5, 4, name="embed")(tokens)
    for _ in range(3):
        x = hk.Linear(4)(hk.LayerNorm(-1, create_scale=True, create_offset=True)(x))
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training=True)
    x = hk.RMSNorm(-1)(hk.GroupNorm(2)(x))
    return hk.Linear(2, name="head")(x)


def haiku_mlp(x):
    return hk.Linear(2, name="head")(hk.nets.MLP([4, 4, 4])(hk.Linear(4, name="stem")(x)))


TOKENS = jnp.zeros((1, 3), jnp.int32)


@functools.cache
def linen():
    return jax.eval_shape(LinenNet().init, jax.random.key(0), TOKENS)["params"]


@functools.cache
def nnx_model():
    return nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))


@functools.cache
def equinox_model():
    return eqx.filter_eval_shape(EqxNet, jax.random.key(0))


def haiku(function, inputs):
    init = hk.transform_with_state(function).init
    return jax.eval_shape(init, jax.random.key(0), inputs)[0]


class Net(NamedTuple):
    """A tree, how its groups are listed, and the depth of each of its arrays."""

    params: Any
    stack: str
    below: list
    above: list
    depth: Callable[[str], int] | None  # None: of a stack, layer by layer
    axis: int | None = None
    structure: lm.Structure | None = None

    def groups(self):
        return recipes.depths(
            self.params,
            self.stack,
            below=self.below,
            above=self.above,
            axis=self.axis,
            structure=self.structure,
        )


def numbered(before, after="", *, first=0, rest=4):
    """The depth by the number of a layer; 0 for the embedding and the stem, else `rest`."""

    def depth(path):
        found = re.match(rf"{before}(\d*){after}(/|$)", path)
        if found is None:
            return 0 if path.startswith(("embed", "stem")) else rest
        return 1 + int(found[1] or 0) - first

    return depth


SHAPES = {"embed": (5, 4), "head/kernel": (4, 2), "head/bias": (2,)}


def family(stem, count, first=0):
    found = {f"{stem}{i}/kernel": (4, 4) for i in range(first, first + count)}
    return tree_of(SHAPES | found | {f"{stem}{first}/bias": (4,)})


UNLIKE = {"conv/w": (4, 4), "dense/w": (4, 4), "again/w": (4, 4)}


@functools.cache
def net(name):
    stem, top = ["embed"], ["head"]
    match name:
        case "linen":
            rest = [["GroupNorm_0", "RMSNorm_0", "BatchNorm_0", "final", "head"]]
            return Net(linen(), "block", stem, rest, numbered("block_"))
        case "nnx":
            params = nnx.state(nnx_model(), nnx.Param)
            return Net(params, "layers", stem, [["{first,second,third}", "head"]], numbered("l.*/"))
        case "equinox":
            params, rest = equinox_model(), [["square", "group", "root", "plain", "head"]]
            return Net(params, "blocks", stem, rest, numbered("blocks/"))
        case "haiku":
            params = haiku(haiku_net, TOKENS)
            norms = ["head", *(f"{each}_norm*" for each in ("layer", "batch", "rms", "group"))]
            return Net(params, "linear", stem, [norms], numbered("linear_?"))
        case "haiku mlp":
            params = haiku(haiku_mlp, jnp.zeros((1, 2)))
            return Net(params, "mlp/~/linear", ["stem"], top, numbered("mlp/~/linear_"))
        case "list":
            params = {"embed": np.ones(2), "net": {"layers": [np.ones(3)] * 3}, "head": np.ones(2)}
            params = jax.eval_shape(lambda: params)
            return Net(params, "net/layers", stem, top, numbered("net/layers/"))
        case "ints":
            params = tree_of(SHAPES) | {"layers": {i: tree_of({"w": (4,)}) for i in (0, 1, 2)}}
            return Net(params, "layers", stem, top, numbered("layers/"))
        case "from 1":
            return Net(family("conv", 3, 1), "conv", stem, top, numbered("conv", first=1))
        case "two digits":
            depth = numbered("block_", rest=13)
            return Net(family("block_", 12), "block", stem, top, depth)
        case "gap":  # a layer without parameters is no depth
            params = tree_of(SHAPES | {f"net/layers_{i}/w": (4,) for i in (0, 2, 3)})

            def depth(path):
                found = re.match(r"net/layers_(\d)", path)
                return {"0": 1, "2": 2, "3": 3}[found[1]] if found else numbered("-")(path)

            return Net(params, "net/layers", stem, top, depth)
        case "order":
            order = ["dense", "pool", "again", "conv", "softmax"]
            structure = lm.Structure(order={"net": order})
            params = tree_of(SHAPES | {f"net/{path}": shape for path, shape in UNLIKE.items()})

            def depth(path):
                found = re.match(r"net/(\w+)", path)
                return (
                    1 + ["dense", "again", "conv"].index(found[1]) if found else numbered("-")(path)
                )

            return Net(params, "net", stem, top, depth, structure=structure)
        case "odd names":
            params = tree_of(SHAPES | {f"a*/b[{i}]/{{w}}": (4,) for i in (0, 1, 2)})
            order = lm.Structure(order={"a\\*": ["b[0]", "b[1]", "b[2]"]})
            depth = numbered(r"a\\\*/b\\\[", r"\\\]")
            return Net(params, "a\\*", stem, top, depth, structure=order)
        case "stacked":
            structure = lm.Structure(stacked={"net/layers": 0})
            params = tree_of(SHAPES | {"net/layers/w": (3, 4), "net/layers/b": (3, 2, 2)})
            return Net(params, "net/layers", stem, top, None, structure=structure)
        case "axis":
            params = tree_of(SHAPES | {"net/layers/w": (3, 4), "net/layers/b": (3, 2, 2)})
            return Net(params, "net/layers", stem, top, None, axis=0)
        case "last axis":
            params = tree_of(SHAPES | {"net/layers/w": (4, 3), "net/layers/b": (2, 2, 3)})
            return Net(params, "net/layers", stem, top, None, axis=-1)
        case "a sequence at the root":
            params = tree_of({f"layers_{i}/w": (4,) for i in range(5)})
            return Net(params, "layers", [], [], lambda path: int(path[7]))
    raise ValueError(name)


NETS = ["linen", "nnx", "equinox", "haiku", "haiku mlp", "list", "ints", "from 1", "two digits"]
NETS += ["gap", "order", "odd names", "stacked", "axis", "last axis", "a sequence at the root"]


def at(rules, step):
    """The rules as they are at a step."""
    return lm.Rules(
        [
            lm.Rule(target, float(each(step)) if callable(each) else each, optional=True)
            for target, each in rules
        ]
    )


def check_depths(found, rules, values, step=None):
    """Every array gets what is due to its depth; frozen where that is 0."""
    plan = lm.compile_rules(at(rules, step or 0), found.params, structure=found.structure)
    assert len(plan.leaves) > 3
    for leaf in plan.leaves:
        got = np.asarray(leaf.multiplier, np.float64)
        if found.depth is None and leaf.path.startswith("net/layers"):
            wanted = np.asarray(values[1:-1], np.float64)
            axis = len(leaf.shape) - 1 if found.axis == -1 else 0
            assert got.shape in ((), tuple(3 if a == axis else 1 for a in range(len(leaf.shape))))
            got = np.broadcast_to(got, leaf.shape).swapaxes(axis, 0).reshape(3, -1)[:, 0]
        else:
            wanted = np.asarray(values[(found.depth or numbered("-"))(leaf.path)])
        exact = 1e-12 if step is None else 1e-7  # schedules give float32
        np.testing.assert_allclose(got, wanted, rtol=exact, atol=0, err_msg=leaf.path)


@pytest.mark.parametrize("name", NETS)
def test_depths_are_from_input_to_output(name):
    found = net(name)
    groups = found.groups()
    assert all(isinstance(group, list) for group in groups)
    values = [0.5**i for i in range(len(groups))]
    pairs = [(each, v) for group, v in zip(groups, values, strict=True) for each in group]
    check_depths(found, lm.Rules(pairs), values)
    again = found.groups()
    groups[-1].append("more")  # they are the caller's
    assert found.groups() == again or name in ("axis", "last axis")
    assert len(found.groups()[-1]) == len(groups[-1]) - 1


# ---- multipliers by depth -----------------------------------------------------------------------

FULL = [0.1, 0.25, 0.5, 0.75, 1.0]


def geometric(lo, hi):
    return lambda i, n, step: math.exp(
        math.log(lo) + (math.log(hi) - math.log(lo)) * i / max(n - 1, 1)
    )


def composer(step, steps, start, level, layers):
    """How many layers Composer's `freeze_layers` freezes when that share of a run is over."""
    duration = step / steps
    share = 0.0 if duration <= start else level * ((duration - start) / (1.0 - start))
    return int(share * (layers - 1))


def multipliers(n):
    return [*FULL[:-1], *[0.9] * (n - 5), 1.0]


# The call, and what depth i of n gets at a step.
GROUPED: dict[str, tuple[Any, Any]] = {
    "layer_decay": (
        lambda p, g, **s: recipes.layer_decay(p, 0.75, g, **s),
        lambda i, n, step: 0.75 ** (n - 1 - i),
    ),
    "layer_decay of 1": (
        lambda p, g, **s: recipes.layer_decay(p, 1, g, **s),
        lambda i, n, step: 1,
    ),
    "layer_decay upwards": (
        lambda p, g, **s: recipes.layer_decay(p, fractions.Fraction(3, 2), g, **s),
        lambda i, n, step: 1.5 ** (n - 1 - i),
    ),
    "discriminative": (
        lambda p, g, **s: recipes.discriminative(p, 1e-3, 1, g, **s),
        geometric(1e-3, 1),
    ),
    "discriminative downwards": (
        lambda p, g, **s: recipes.discriminative(p, 2.0, np.float32(0.5), g, **s),
        geometric(2.0, 0.5),
    ),
    "discriminative of one": (
        lambda p, g, **s: recipes.discriminative(p, None, 0.4, g, **s),
        lambda i, n, step: 0.4 if i == n - 1 else 0.04,
    ),
    "freeze_to -1": (
        lambda p, g, **s: recipes.freeze_to(p, -1, g, **s),
        lambda i, n, step: int(i == n - 1),
    ),
    "freeze_to 2": (
        lambda p, g, **s: recipes.freeze_to(p, np.int64(2), g, **s),
        lambda i, n, step: int(i >= 2),
    ),
    "freeze_to 0": (
        lambda p, g, **s: recipes.freeze_to(p, 0, g, **s),
        lambda i, n, step: 1,
    ),
    "freeze_to all": (
        lambda p, g, **s: recipes.freeze_to(p, len(g), g, **s),
        lambda i, n, step: 0,
    ),
    "freeze_to none": (
        lambda p, g, **s: recipes.freeze_to(p, -len(g), g, **s),
        lambda i, n, step: 1,
    ),
    "gradual_unfreezing": (
        lambda p, g, **s: recipes.gradual_unfreezing(p, g, 3, **s),
        lambda i, n, step: int(step >= 3 * (n - 1 - i)),
    ),
    "gradual_unfreezing by steps": (
        lambda p, g, **s: recipes.gradual_unfreezing(
            p, g, [0, 2, 2, 9, *range(10, 5 + len(g))], multipliers=multipliers(len(g)), **s
        ),
        lambda i, n, step: (
            multipliers(n)[i] * (i == n - 1 or step >= [0, 2, 2, 9, *range(10, 99)][n - 2 - i])
        ),
    ),
    "progressive_freezing": (
        lambda p, g, **s: recipes.progressive_freezing(p, g, 12, **s),
        lambda i, n, step: int(i >= composer(step, 12, 0.5, 1.0, n)),
    ),
    "progressive_freezing of some": (
        lambda p, g, **s: recipes.progressive_freezing(p, g, 12, start=0.1, level=0.6, **s),
        lambda i, n, step: int(i >= composer(step, 12, 0.1, 0.6, n)),
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("recipe", GROUPED)
def test_every_depth_gets_its_multiplier(recipe, name):
    found = net(name)
    call, formula = GROUPED[recipe]
    groups = found.groups()
    n = len(groups)
    rules = call(found.params, groups, structure=found.structure)
    assert all(rule.optional for rule in rules)
    scheduled = any(callable(rule.multiplier) for rule in rules)
    assert scheduled == ("gradual" in recipe or "progressive" in recipe)
    for step in (0, 2, 3, 7, 9, 11) if scheduled else (None,):
        check_depths(found, rules, [formula(i, n, step) for i in range(n)], step)


@pytest.mark.parametrize("name", NETS)
def test_stages(name):
    found = net(name)
    groups = found.groups()
    n = len(groups)
    for given_multipliers in (None, multipliers(n), np.array(multipliers(n)).tolist()):
        stages = recipes.unfreezing_stages(
            found.params, groups, multipliers=given_multipliers, structure=found.structure
        )
        full = given_multipliers or [1] * n
        assert len(stages) == n
        for stage, rules in enumerate(stages):
            assert all(rule.optional for rule in rules)
            values = [m if i >= n - 1 - stage else 0 for i, m in enumerate(full)]
            check_depths(found, rules, values)


def test_a_depth_without_parameters_counts():
    params = tree_of(SHAPES)
    rules = recipes.layer_decay(params, 0.5, ["embed", [], [], "head"])
    assert rules == lm.optional([("embed", 0.125), ("head", 1.0)])
    frozen = recipes.freeze_to(params, -2, ["embed", [], "head"])
    assert frozen == lm.optional([("embed", None)])


def test_groups_may_be_any_targets():
    params = tree_of(SHAPES | {"layers/0/w": (4,), "layers/1/w": (4,)})
    groups = (
        lm.rows("embed", slice(0, 2)),
        [("layers", 0), lm.rows("embed", 2)],
        re.compile("layers/.*"),
        ["head", ...],
    )
    rules = recipes.layer_decay(params, 0.5, groups)
    plan = lm.compile_rules(rules, params)
    found = {leaf.path: leaf.multiplier for leaf in plan.leaves}
    assert found.pop("embed").ravel().tolist() == [0.125, 0.125, 0.25, 1, 1]
    assert found == {"head/bias": 1, "head/kernel": 1, "layers/0/w": 0.25, "layers/1/w": 0.5}
    assert recipes.layer_decay(params, 0.5, iter(groups)) == rules


def test_one_group_is_the_last():
    params = tree_of(SHAPES)
    assert recipes.layer_decay(params, 0.1, [...]) == lm.optional([(..., 1)])
    assert recipes.discriminative(params, 0.1, 0.5, [...]) == lm.optional([(..., 0.5)])
    assert recipes.discriminative(params, None, 0.5, [...]) == lm.optional([(..., 0.5)])
    assert recipes.freeze_to(params, -1, [...]) == lm.Rules()
    assert recipes.gradual_unfreezing(params, [...], 5) == lm.optional([(..., 1)])
    assert recipes.gradual_unfreezing(params, [...], []) == lm.optional([(..., 1)])
    assert recipes.unfreezing_stages(params, [...]) == [lm.optional([(..., 1)])]
    assert recipes.progressive_freezing(params, [...], 9) == lm.optional([(..., 1)])


def test_fastai_freezes_and_then_discriminates():
    found = net("linen")
    groups = found.groups()
    n = len(groups)
    rates = recipes.discriminative(found.params, 0.01, 1, groups)
    for k in range(-n, n + 1):
        rules = recipes.freeze_to(found.params, k, groups) + rates
        frozen = k if k >= 0 else n + k
        values = [0 if i < frozen else 0.01 ** (1 - i / (n - 1)) for i in range(n)]
        check_depths(found, rules, values)
    norms = lm.Rules([("**/LayerNorm_*", 1)])  # train_bn
    rules = norms + recipes.freeze_to(found.params, -1, groups)
    trained = {leaf.path for leaf in lm.compile_rules(rules, found.params).leaves if leaf.trained}
    assert trained >= {f"block_{i}/LayerNorm_0/scale" for i in range(3)}
    assert not any("Dense_0" in path for path in trained)


def test_ulmfit_discriminates_while_it_thaws():
    params, groups = tree_of(SHAPES | {"body": (3,)}), ["embed", "body", "head"]
    rates = [2.6**-2, 2.6**-1, 1]
    rules = recipes.gradual_unfreezing(params, groups, 10, multipliers=rates)
    full = recipes.layer_decay(params, 1 / 2.6, groups)
    for step, frozen in ((9, 2), (10, 1), (19, 1), (20, 0)):
        both = recipes.freeze_to(params, frozen, groups) + full
        assert values(at(rules, step), params) == pytest.approx(values(both, params), rel=1e-6)


@cases(40)
@given(
    st.integers(1, 150),
    st.one_of(st.floats(0, 0.99), st.sampled_from([0, 0.5, 0.1, 0.3, 0.7])),
    st.one_of(st.floats(0, 1), st.sampled_from([0, 1, 0.5, 1.0])),
    st.integers(1, 9),
)
def test_progressive_freezing_is_composers(steps, start, level, n):
    params = {f"a{i}": np.zeros(2) for i in range(n)}
    rules = recipes.progressive_freezing(
        params, [f"a{i}" for i in range(n)], steps, start=start, level=level
    )
    every = np.arange(steps)
    trains = np.stack(
        [
            np.asarray(each(every)) != 0 if callable(each) else np.full(steps, each is not None)
            for _, each in rules
        ]
    )
    frozen = np.array([composer(step, steps, start, level, n) for step in range(steps)])
    np.testing.assert_array_equal(trains, np.arange(n)[:, None] >= frozen)
    for _, each in rules:
        assert not callable(each) or 0 < each.stop < steps  # what never freezes has no schedule


def test_progressive_freezing_of_a_long_run():
    params = {"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(2)}
    steps = 10**9
    first, second, last = recipes.progressive_freezing(params, ["a", "b", "c"], steps, start=0.25)
    for rule, count in ((first, 1), (second, 2)):
        stop = rule.multiplier.stop if rule.multiplier != 1 else steps
        assert composer(stop - 1, steps, 0.25, 1.0, 3) < count
        assert stop == steps or composer(stop, steps, 0.25, 1.0, 3) == count
    assert first.multiplier.stop == pytest.approx(0.625 * steps, rel=1e-6)
    assert last.multiplier == 1


# ---- training by groups that thaw ---------------------------------------------------------------

PARAMS = {
    "body": jnp.cos(jnp.arange(6.0)).reshape(2, 3),
    "neck": jnp.sin(jnp.arange(4.0)),
    "head": jnp.array([-0.0, -0.0, 0.0]),
}
GROUPS = ["body", "neck", "head"]
STARTS = {"body": 6, "neck": 2, "head": 0}
RATES = {"body": 0.25, "neck": 0.5, "head": 1.0}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "decaying": optax.adam(optax.linear_schedule(0.1, 0.01, 12)),
}


def gradients(params, step):
    """Such as depend on each parameter and on the step."""
    return jax.tree.map(
        lambda p: jnp.cos(jnp.arange(p.size).reshape(p.shape) * 1.3 + step) + 0.3 * p, params
    )


def alone(optimizer, name, steps, begins=0):
    """One group by itself: an optimizer of its own, whose updates are dropped until it thaws.

    What it keeps begins at a step, and so would it at step 0, but for the count of steps.
    """
    param, seen = PARAMS[name], []

    @jax.jit
    def step(param, state, i):
        updates, state = optimizer.update(gradients(param, i), state, param)
        return param + RATES[name] * updates, state

    state = None
    for i in range(steps):
        if i == begins:
            state = jax.tree.map(
                lambda x: jnp.full_like(x, i) if x.dtype == jnp.int32 else x,  # noqa: B023
                optimizer.init(param),
            )
        if state is not None:
            moved, state = step(param, state, i)
            param = moved if i >= STARTS[name] else param
        seen.append(param)
    return seen


@pytest.mark.parametrize("how", ["chain", "wrap"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradual_unfreezing_in_one_compiled_step(name, how):
    optimizer = OPTIMIZERS[name]
    rates = [RATES[group] for group in GROUPS]
    rules = recipes.gradual_unfreezing(PARAMS, GROUPS, [2, 6], multipliers=rates)
    tx = lm.wrap(optimizer, rules)
    if how == "chain":
        tx = optax.chain(optimizer, lm.scale_by_rules(rules))
    traces = []

    @jax.jit
    def step(params, state, i):
        traces.append(i)
        updates, state = tx.update(gradients(params, i), state, params)
        return optax.apply_updates(params, updates), state

    wanted = {group: alone(optimizer, group, 9) for group in GROUPS}
    params, state = PARAMS, tx.init(PARAMS)
    shapes = jax.tree.map(jnp.shape, state)
    for i in range(9):
        before = params
        params, state = step(params, state, i)
        for group in GROUPS:
            kept = params[group].tobytes() == before[group].tobytes()
            assert kept == (i < STARTS[group])
            np.testing.assert_allclose(params[group], wanted[group][i], rtol=1e-5, atol=1e-6)
    assert len(traces) == 1
    assert jax.tree.map(jnp.shape, state) == shapes


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stages_are_separate_optimizers(name, compact):
    """Each begins when its group thaws, but counts steps from the start."""
    optimizer = OPTIMIZERS[name]
    stages = recipes.unfreezing_stages(PARAMS, GROUPS, multipliers=[RATES[g] for g in GROUPS])
    wanted = {group: alone(optimizer, group, 9, begins=STARTS[group]) for group in GROUPS}
    params, state, old, sizes = PARAMS, None, None, []
    for rules, steps in zip(stages, (range(2), range(2, 6), range(6, 9)), strict=True):
        tx = lm.wrap(optimizer, rules, compact=compact)
        if state is None:
            state = tx.init(params)
        else:
            state = lm.migrate(state, params, optimizer, old, rules, compact=compact)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim))
        old, begin = rules, params

        @jax.jit
        def step(params, state, i, tx=tx):
            updates, state = tx.update(gradients(params, i), state, params)
            return optax.apply_updates(params, updates), state

        for i in steps:
            params, state = step(params, state, i)
            for group in GROUPS:
                np.testing.assert_allclose(params[group], wanted[group][i], rtol=1e-5, atol=1e-6)
        lm.assert_frozen(begin, params, rules)
    moments = sizes[0] // 3
    assert sizes == [3 * moments, 7 * moments, 13 * moments]  # nothing is kept for what is frozen


def test_progressive_freezing_trains_ever_less():
    rules = recipes.progressive_freezing(PARAMS, GROUPS, 8, start=0.25)
    tx = optax.chain(optax.adamw(0.1), lm.scale_by_rules(rules))
    step = jax.jit(tx.update)
    params, state, trained = PARAMS, tx.init(PARAMS), []
    for i in range(8):
        updates, state = step(gradients(params, i), state, params)
        after = optax.apply_updates(params, updates)
        moved = [g for g in GROUPS if after[g].tobytes() != params[g].tobytes()]
        trained.append(len(moved))
        assert moved == GROUPS[composer(i, 8, 0.25, 1.0, 3) :]
        params = after
    assert trained == sorted(trained, reverse=True)
    assert trained[0] == 3
    assert trained[-1] < 3


# ---- what trains alone --------------------------------------------------------------------------


def trained(rules, params, structure=None):
    plan = lm.compile_rules(rules, params, structure=structure)
    return {leaf.path for leaf in plan.leaves if leaf.trained}


def whole(params):
    return {leaf.path for leaf in lm.compile_rules([], params).leaves}


LIBRARIES = ["linen", "nnx", "equinox", "haiku"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_linear_probe(name):
    params = net(name).params
    head = {path for path in whole(params) if path.startswith("head/")}
    assert len(head) == 2
    assert trained(recipes.linear_probe(params, "head"), params) == head
    norms = {path for path in whole(params) if "norm" in path.lower()}
    if norms:
        rules = recipes.linear_probe(params, ["head", *sorted(norms)])
        assert trained(rules, params) == head | norms


@pytest.mark.parametrize("name", LIBRARIES)
def test_bitfit(name):
    params = net(name).params
    biases = {path for path in whole(params) if path.split("/")[-1] in ("bias", "b", "offset")}
    assert len(biases) > 4
    assert trained(recipes.bitfit(params), params) == biases
    head = {path for path in whole(params) if path.startswith("head/")}
    assert trained(recipes.bitfit(params, head="head"), params) == biases | head
    assert not head <= biases
    of_blocks = {path for path in biases if re.match("block|layer|linear", path)}
    rules = recipes.bitfit(params, biases=sorted(of_blocks))
    assert trained(rules, params) == of_blocks


NNX_NORMS = (nnx.LayerNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.RMSNorm)
EQX_NORMS = (eqx.nn.LayerNorm, eqx.nn.GroupNorm, eqx.nn.RMSNorm)


@pytest.mark.parametrize("name", LIBRARIES)
def test_norms_only(name):
    params = net(name).params
    by_name = {path for path in whole(params) if re.search("norm|final", path, re.IGNORECASE)}
    wanted = {
        "linen": lambda: by_name,
        "haiku": lambda: by_name,
        "nnx": lambda: trained([(lm.of_type(nnx_model(), NNX_NORMS), 1), (..., None)], params),
        "equinox": lambda: trained(
            [(lm.of_type(equinox_model(), EQX_NORMS), 1), (..., None)], params
        ),
    }[name]()
    assert len(wanted) > 9
    rules = recipes.norms_only(params)
    assert trained(rules, params) == wanted
    assert len(rules) < len(wanted) / 2 + 1  # a rule for each layer at most, not for each array
    head = {path for path in whole(params) if path.startswith("head/")}
    assert trained(recipes.norms_only(params, head="head"), params) == wanted | head
    assert trained(recipes.norms_only(params, norms="head"), params) == head


def test_norms_of_a_whole_nnx_state():
    """Beside their parameters stand the statistics of BatchNorm."""
    model = nnx_model()
    state = nnx.state(model)
    wanted = trained([(lm.of_type(model, NNX_NORMS), 1), (..., None)], nnx.state(model, nnx.Param))
    assert trained(recipes.norms_only(state), state) - {"first/mean", "first/var"} == wanted


def test_norms_of_equinox_with_state():

    def make():
        linear = eqx.nn.Linear(3, 3, key=jax.random.key(0))
        return eqx.nn.Sequential([linear, eqx.nn.BatchNorm(3, "batch", mode="ema"), eqx.nn.PReLU()])

    model = eqx.filter(eqx.nn.make_with_state(make)()[0], eqx.is_inexact_array)
    assert trained(recipes.norms_only(model), model) == {"layers/1/weight", "layers/1/bias"}


# Trees of which a pattern with a star in place of the number would catch too much.
NORMS = {
    "a name like a number's": (
        {"norm_0/scale": (4,), "norm_1/scale": (4,), "norm_x/kernel": (4, 4)},
        {"norm_0/scale", "norm_1/scale"},
    ),
    "a number that is none": (
        {"block_0/n/scale": (4,), "block_1/n/scale": (4,), "block_2/n/kernel": (4, 4)},
        {"block_0/n/scale", "block_1/n/scale"},
    ),
    "stem alone": (
        {"norm/scale": (4,), "norm_1/scale": (4,), "norm_/w": (4,), "normal/w": (4,)},
        {"norm/scale", "norm_1/scale"},
    ),
    "numbers within": (
        {"a1b/scale": (4,), "a2b/scale": (4,), "a3b/kernel": (4,)},
        {"a1b/scale", "a2b/scale"},
    ),
    "two levels": (
        {f"s_{i}/b_{j}/n/{k}": (4,) for i in (0, 1) for j in (0, 1) for k in ("scale", "bias")}
        | {"s_0/b_x/n/w": (4,), "s_1/b_0/d/kernel": (4, 4)},
        {f"s_{i}/b_{j}/n/{k}" for i in (0, 1) for j in (0, 1) for k in ("scale", "bias")},
    ),
    "special names": (
        {"n[0]/scale": (4,), "n*/scale": (4,), "n{a,b}_1/scale": (4,), "nx/kernel": (4, 4)},
        {r"n\[0\]/scale", r"n\*/scale", r"n\{a,b\}_1/scale"},
    ),
    "Equinox": (
        {
            "fc/weight": (4, 4),
            "fc/bias": (4,),
            "flat/weight": (4, 1),
            "flat/bias": (4,),
            "one/weight": (1, 1),
            "one/bias": (1,),
            "ln/weight": (3, 4),
            "ln/bias": (3, 4),
            "rms/weight": (4,),
            "embed/weight": (9, 4),
            "act/negative_slope": (),
        },
        {"ln/weight", "ln/bias", "rms/weight"},
    ),
    "more beside the scale": (
        {"q/scale": (4,), "q/kernel": (4, 4), "n/scale": (4,), "n/bias": (4,), "m/bias": (4,)},
        {"n/scale", "n/bias"},
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_and_nothing_else(name):
    shapes, wanted = NORMS[name]
    params = tree_of(shapes)
    assert trained(recipes.norms_only(params), params) == wanted
    assert wanted < whole(params)


def test_many_norms_are_few_rules():
    shapes = {f"block_{i}/norm{j}/scale": (4,) for i in range(40) for j in (1, 2)}
    params = tree_of(shapes | {f"block_{i}/fc/kernel": (4, 4) for i in range(40)})
    rules = recipes.norms_only(params)
    assert trained(rules, params) == {*shapes}
    assert len(rules) == 2
    more = {"act_0/scale": (4,), "act_1/kernel": (4,)}  # of these, one by name
    rules = recipes.norms_only(tree_of(shapes | more))
    assert trained(rules, tree_of(shapes | more)) == {*shapes, "act_0/scale"}
    assert len(rules) == 3


@pytest.mark.parametrize(
    "params",
    [tree_of(SHAPES), {}, np.zeros(3), {"scale": {}}, {"norm": {"scale": None, "kernel": None}}],
)
def test_no_norms(params):
    with pytest.raises(lm.RuleError, match=r"^norms_only: no layer looks like .*norms=\["):
        recipes.norms_only(params)


class LoraNet(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)
        self.lora = nnx.LoRA(4, 2, 4, base_module=nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)


def values(rules, params):
    return {leaf.path: leaf.multiplier for leaf in lm.compile_rules(rules, params).leaves}


def test_lora_plus():
    model = nnx.eval_shape(lambda: LoraNet(nnx.Rngs(0)))
    params = nnx.state(model)
    adapters = lm.of_type(model, nnx.LoRAParam)
    found = values(recipes.lora_plus(params), params)
    assert {path for path, value in found.items() if value} == trained(
        [(adapters, 1), (..., None)], params
    )
    for path, value in found.items():
        assert value == {"lora_a": 1, "lora_b": 16}.get(path.split("/")[-1], 0)
    found = values(recipes.lora_plus(params, 0.5, head=["head"]), params)
    for path, value in found.items():
        known = {"lora_a": 1, "lora_b": 0.5}
        assert value == (1 if path.startswith("head/") else known.get(path.split("/")[-1], 0))


def test_lora_plus_of_other_names():
    shapes = {"q/A": (4, 2), "q/B": (2, 4), "q/kernel": (4, 4), "v/down": (4, 2), "v/up": (2, 4)}
    params = tree_of(shapes | {"x/my_lora_A": (2,), "x/my_lora_B/default": (2,), "lora_alpha": ()})
    found = values(recipes.lora_plus(params, 4, a=["q/A", "v/down"], b=["q/B", "v/up"]), params)
    assert found == {
        "q/A": 1,
        "q/B": 4,
        "q/kernel": 0,
        "v/down": 1,
        "v/up": 4,
        "x/my_lora_A": 0,
        "x/my_lora_B/default": 0,
        "lora_alpha": 0,
    }
    found = values(recipes.lora_plus(params, 4), params)
    assert {path: value for path, value in found.items() if value} == {
        "x/my_lora_A": 1,
        "x/my_lora_B/default": 4,
    }
    with pytest.raises(lm.UnmatchedRuleError, match="lora_plus: rule 0"):
        recipes.lora_plus(tree_of(SHAPES))


def test_lora_plus_trains_b_faster():
    params = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.zeros((1, 4)), "kernel": jnp.ones((4, 4))}
    tx = lm.wrap(optax.sgd(0.5), recipes.lora_plus(params, 8))
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert {name: float(u.ravel()[0]) for name, u in updates.items()} == {
        "lora_a": -0.5,
        "lora_b": -4.0,
        "kernel": 0.0,
    }


TIED = {"embed": {"embedding": np.zeros((10, 4))}, "trunk": np.zeros((4, 4))}


@pytest.mark.parametrize(
    ("index", "rows"),
    [(slice(-3, None), [7, 8, 9]), ([0, 5], [0, 5]), (-1, [9]), (np.arange(10) > 7, [8, 9])],
)
def test_new_tokens(index, rows):
    rules = recipes.new_tokens(TIED, "embed/embedding", index)
    plan = lm.compile_rules(rules, TIED)
    trains = ~np.broadcast_to(plan.frozen["embed"]["embedding"], (10, 4))
    assert np.flatnonzero(trains.all(axis=1)).tolist() == rows
    assert trains.sum() == 4 * len(rows)
    assert plan.multipliers["trunk"] == 0
    rules = recipes.new_tokens(TIED, "embed", index, head="trunk")
    assert lm.compile_rules(rules, TIED).multipliers["trunk"] == 1


def test_new_tokens_of_a_tied_embedding():
    structure = lm.Structure(shared=[["embed/embedding", "head/kernel"]])
    tokens = slice(-2, None)
    for named in ("embed/embedding", "head/kernel", ["embed", "head/kernel"]):
        rules = recipes.new_tokens(TIED, named, tokens, structure=structure)
        plan = lm.compile_rules(rules, TIED, structure=structure)
        assert plan.multipliers["embed"]["embedding"].ravel().tolist() == [0.0] * 8 + [1.0] * 2
        assert plan.multipliers["trunk"] == 0


def test_new_tokens_of_an_output_layer_of_its_own():
    params = TIED | {"head": {"kernel": np.zeros((4, 10)), "bias": np.zeros(10)}}
    tokens, columns = slice(-2, None), lm.neurons("head", slice(-2, None))
    rules = recipes.new_tokens(params, "embed", tokens, head=columns)
    plan = lm.compile_rules(rules, params)
    assert {leaf.path: leaf.trained for leaf in plan.leaves} == {
        "embed/embedding": 8,
        "head/bias": 2,
        "head/kernel": 8,
        "trunk": 0,
    }


def test_new_tokens_train_and_no_others():
    params = jax.tree.map(lambda x: x - 0.5, TIED)
    rules = recipes.new_tokens(params, "embed", [1, 3])
    for compact in (False, True):
        tx = lm.wrap(optax.adamw(0.1), rules, compact=compact)
        grads = jax.tree.map(np.ones_like, params)
        state = tx.init(params)
        moments = optax.tree.get(state, "mu")["embed"]["embedding"]
        assert moments.shape == ((2, 4) if compact else (10, 4))
        updates, _ = tx.update(grads, state, params)
        moved = np.any(np.asarray(updates["embed"]["embedding"]) != 0, axis=1)
        assert np.flatnonzero(moved).tolist() == [1, 3]


# ---- widths -------------------------------------------------------------------------------------


def flax_mlp(width, hidden):
    """Linen's names and layouts: a tree, and for each array its kind."""
    return {
        "in/kernel": (3, width),
        "in/bias": (width,),
        "up/kernel": (width, hidden),
        "up/bias": (hidden,),
        "down/kernel": (hidden, width),
        "down/bias": (width,),
        "norm/scale": (width,),
        "out/kernel": (width, 10),
        "out/bias": (10,),
        "temperature": (),
    }


def equinox_mlp(width, hidden):
    return {
        "in/weight": (width, 3),
        "in/bias": (width,),
        "up/weight": (hidden, width),
        "up/bias": (hidden,),
        "down/weight": (width, hidden),
        "down/bias": (width,),
        "norm/weight": (width,),
        "out/weight": (10, width),
        "out/bias": (10,),
    }


def by_hand(r, h, optimizer, outputs):
    """Table 8 of Tensor Programs V, by the fans of each array; r and h are the ratios of widths."""
    fans = {  # how inputs and outputs have grown
        "in/kernel": (1, r),
        "in/bias": (1, r),
        "up/kernel": (r, h),
        "up/bias": (1, h),
        "down/kernel": (h, r),
        "down/bias": (1, r),
        "norm/scale": (1, r),
        "out/kernel": (r, 1),
        "out/bias": (1, 1),
        "temperature": (1, 1),
    }
    found = {}
    for path, (ins, outs) in fans.items():
        kind = "hidden" if ins > 1 and outs > 1 else "vector"
        if outputs and path == "out/kernel":
            found[path] = 1 / r
        elif optimizer == "adam":
            found[path] = 1 / ins if kind == "hidden" else 1
        else:
            found[path] = outs / ins if kind == "hidden" else max(ins, outs)
    return found


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("ratios", [(4, 4), (4, 8), (2, 3)])
def test_mup_of_an_mlp(ratios, optimizer, outputs):
    r, h = ratios
    wanted = by_hand(r, h, optimizer, outputs)
    params, base = tree_of(flax_mlp(8 * r, 6 * h)), tree_of(flax_mlp(8, 6))
    rules = recipes.mup(params, base, optimizer, output="out/kernel" if outputs else None)
    assert values(rules, params) == pytest.approx(wanted, rel=1e-12)
    assert all(rule.optional for rule in rules)
    renamed = {
        re.sub("kernel|scale", "weight", path): value
        for path, value in wanted.items()
        if path != "temperature"
    }
    params, base = tree_of(equinox_mlp(8 * r, 6 * h)), tree_of(equinox_mlp(8, 6))
    rules = recipes.mup(params, base, optimizer, output="out/weight" if outputs else None)
    assert values(rules, params) == pytest.approx(renamed, rel=1e-12)


def attention(width, heads, size, blocks=2):
    found = {"embed/embedding": (100, width), "pos": (1, 7, width), "head/kernel": (width, 100)}
    for i in range(blocks):
        for name in ("query", "key", "value"):
            found[f"block_{i}/{name}/kernel"] = (width, heads, size)
            found[f"block_{i}/{name}/bias"] = (heads, size)
        found[f"block_{i}/out/kernel"] = (heads, size, width)
        found[f"block_{i}/out/bias"] = (width,)
        found[f"block_{i}/norm/scale"] = (width,)
    return tree_of(found)


@pytest.mark.parametrize(("optimizer", "vector", "hidden"), [("adam", 1, 1 / 4), ("sgd", 4, 1)])
def test_mup_of_attention(optimizer, vector, hidden):
    params = attention(64, 8, 8)
    rules = recipes.mup(params, attention(16, 2, 8), optimizer)
    for path, value in values(rules, params).items():
        is_hidden = re.fullmatch(r"block_\d/(query|key|value|out)/kernel", path)
        assert value == (hidden if is_hidden else vector), path
    assert len(rules) < 14  # of 21 arrays
    more = attention(64, 8, 8, blocks=12), attention(16, 2, 8, blocks=12)
    assert len(recipes.mup(*more, optimizer)) == len(rules)


def test_mup_of_convolutions():
    def shapes(ins, outs):
        conv = {"conv/kernel": (3, 3, ins, outs), "conv/bias": (outs,)}
        return conv | {"dw/kernel": (3, 3, 1, outs)}

    params, base = tree_of(shapes(16, 64)), tree_of(shapes(8, 8))
    adam, sgd = (values(recipes.mup(params, base, o), params) for o in ("adam", "sgd"))
    assert adam == {"conv/kernel": 1 / 2, "conv/bias": 1, "dw/kernel": 1}
    assert sgd == {"conv/kernel": 8 / 2, "conv/bias": 8, "dw/kernel": 8}


def test_mup_of_an_equinox_convolution():
    params, base = (
        eqx.filter_eval_shape(eqx.nn.Conv1d, ins, outs, 3, key=jax.random.key(0))
        for ins, outs in ((16, 64), (8, 8))
    )
    for optimizer, kernel, bias in (("adam", 1 / 2, 1), ("sgd", 8 / 2, 8)):
        rules = recipes.mup(params, base, optimizer, structure=lm.structure_of(params))
        assert values(rules, params) == {"weight": kernel, "bias": bias}


def test_mup_of_stacked_layers():
    params, base = ({"layers": {"w": np.zeros((3, n, n))}} for n in (8, 2))
    structure = lm.Structure(stacked={"layers": 0})
    rules = recipes.mup(params, base, structure=structure)
    plan = lm.compile_rules(rules, params, structure=structure)
    assert plan.multipliers == {"layers": {"w": 0.25}}


def test_mup_takes_shapes_and_any_model():
    model, base = (jax.eval_shape(lambda n=n: {"w": jnp.ones((n, n))}) for n in (8, 2))
    assert values(recipes.mup(model, base), model) == {"w": 0.25}
    assert values(recipes.mup({"w": jnp.ones((8, 8))}, base), model) == {"w": 0.25}
    assert values(recipes.mup(base, model), base) == {"w": 4}  # a narrower one
    assert values(recipes.mup(model, model), model) == {"w": 1}


def test_mup_of_shared_arrays():
    params, base = ({name: {"kernel": np.zeros(s)} for name in "ab"} for s in ((8, 16), (4, 4)))
    structure = lm.Structure(shared=[["a/kernel", "b/kernel"]])
    rules = recipes.mup(params, base, "sgd", structure=structure)
    plan = lm.compile_rules(rules, params, structure=structure)
    assert plan.multipliers == {"a": {"kernel": 2}, "b": {"kernel": 2}}


def test_mup_learns_as_the_base_model_does():
    """With Adam, the change of activations in the first step does not hang on the width."""

    def change(width):
        random = np.random.default_rng(0)
        shapes = {"in": (4, width), "mid": (width, width), "out": (width, 1)}
        params = {
            name: np.float32(random.normal(size=shape) * shape[0] ** -0.5)
            for name, shape in shapes.items()
        }
        base = {name: np.zeros([16 if n == width else n for n in s]) for name, s in shapes.items()}
        rules = recipes.mup(params, base, output="out")
        tx = optax.chain(optax.scale_by_sign(), optax.scale(-1e-3), lm.scale_by_rules(rules))
        x = np.float32(random.normal(size=(8, 4)))

        def hidden(p):
            return jax.nn.relu(jax.nn.relu(x @ p["in"]) @ p["mid"])

        @jax.jit
        def changed(params):
            grads = jax.grad(lambda p: jnp.mean((hidden(p) @ p["out"] - 1) ** 2))(params)
            updates, _ = tx.update(grads, tx.init(params), params)
            after = optax.apply_updates(params, updates)
            return jnp.abs(hidden(after) - hidden(params)).mean()

        return float(changed(params))

    narrow, wide = change(32), change(512)
    assert 0.6 < wide / narrow < 1.6


def mup_of(shape, base, **others):
    return recipes.mup(
        tree_of({"a/w": shape} | others), tree_of({"a/w": base} | others), output=None
    )


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: mup_of((8, 8, 8), (2, 2, 2)), lm.RuleError, ("'a/w' has 3 axes", "heads")),
        (lambda: mup_of((8, 8), (2,)), lm.RuleError, ("'a/w'", "(8, 8)", "(2,)")),
        (lambda: mup_of((8,), (0,)), lm.RuleError, ("'a/w'",)),
        (lambda: mup_of((8, 16, 3), (4, 4, 3)), lm.AxisError, ("mup", "'a/w'", "unlike ratios")),
        (
            lambda: recipes.mup(tree_of({"x/y": (4, 8)}), tree_of({"x/y": (2, 2)})),
            lm.AxisError,
            ("mup", "'x/y'"),
        ),
        (
            lambda: recipes.mup(tree_of({"a": (4,), "c": (1,)}), tree_of({"a": (4,), "b": (1,)})),
            lm.RuleError,
            ("'b'", "'c'", "one of the two models"),
        ),
        (
            lambda: recipes.mup(tree_of(flax_mlp(8, 8)), tree_of(flax_mlp(4, 4)), "adamw"),
            lm.RuleError,
            ("'adamw'", "'adam' or 'sgd'"),
        ),
        (
            lambda: recipes.mup(tree_of(flax_mlp(8, 8)), tree_of(flax_mlp(4, 4)), output="up"),
            lm.RuleError,
            ("'up/kernel'", "no output weight", "2 of its axes"),
        ),
        (
            lambda: recipes.mup(tree_of(flax_mlp(8, 8)), tree_of(flax_mlp(4, 4)), output="ot"),
            lm.UnmatchedRuleError,
            ("mup", "'ot'", "'out'"),
        ),
    ],
)
def test_widths_that_make_no_sense(call, error, says):
    with pytest.raises(error) as caught:
        call()
    assert all(words in str(caught.value) for words in says), str(caught.value)


# ---- depths that cannot be ----------------------------------------------------------------------

STACK = {
    "net": {
        "layers": {"w": np.zeros((3, 4)), "b": np.zeros((3, 2))},
        "blocks": [np.zeros(1), np.zeros(1)],
    },
    "convs": {"c1": np.zeros(1), "c_2": np.zeros(1)},
    "empty": [],
    "head": np.zeros(2),
}


@pytest.mark.parametrize(
    ("stack", "options", "error", "says"),
    [
        ("net/layer", {}, lm.UnmatchedRuleError, ("'net/layer[:]'", "'layers'")),
        ("layers", {}, lm.UnmatchedRuleError, ("'layers[:]'", "net/")),
        ("net/layers", {}, lm.PositionError, ("'b' and 'w'", "unlike names")),
        ("convs", {}, lm.PositionError, ("unlike names",)),
        ("convs/c", {}, lm.PositionError, ("'c1'", "'c_2'")),
        ("head", {}, lm.PositionError, ("is an array",)),
        ("empty", {}, lm.UnmatchedRuleError, ("'empty[:]'",)),
        ("**/layers", {}, lm.PatternError, ("'**/layers' is no path",)),
        ("net/blocks[0]", {}, lm.PatternError, ("no path of a stack",)),
        ("net/{layers,blocks}", {}, lm.PatternError, ("no path of a stack",)),
        (("net", "blocks"), {}, lm.PatternError, ("no path of a stack",)),
        (None, {}, lm.PatternError, ("None is no path",)),
        (..., {}, lm.PatternError, ("Ellipsis is no path",)),
        ("net/blocks/", {}, lm.PatternError, ("ends with a '/'",)),
        ("net/blocks[", {}, lm.PatternError, ("never closed",)),
        ("net/layers", {"axis": 2}, lm.AxisError, ("no axis 2",)),
        ("net/layers", {"axis": True}, lm.AxisError, ("True is no axis",)),
        ("net/layers", {"axis": "0"}, lm.AxisError, ("'0' is no axis",)),
        ("net/layers", {"axis": 1}, lm.RuleError, ("axis 1", "net/layers/b", "net/layers/w")),
        ("net/layer", {"axis": 0}, lm.UnmatchedRuleError, ("'net/layers'",)),
        ("net/blocks", {"below": "head"}, lm.RuleError, ("below is 'head'", "a list")),
        ("net/blocks", {"above": 5}, lm.RuleError, ("above is 5", "a list")),
        ("net/blocks", {"above": ...}, lm.RuleError, ("above is Ellipsis", "a list")),
    ],
)
def test_stacks_that_are_none(stack, options, error, says):
    with pytest.raises(error) as caught:
        recipes.depths(STACK, stack, **options)
    assert type(caught.value) is error
    assert all(words in str(caught.value) for words in says), str(caught.value)


def test_a_stack_that_is_told_needs_no_axis():
    structure = lm.Structure(stacked={"net/layers": 0})
    assert len(recipes.depths(STACK, "net/layers", structure=structure)) == 3
    with pytest.raises(lm.PositionError, match="unlike names"):
        recipes.depths(STACK, "convs", structure=structure)
    names = lm.Structure(order={"convs": ["c_2", "relu", "c1"]})
    found = recipes.depths(STACK, "convs", structure=structure | names)
    assert found == [["convs/c_2"], ["convs/c1"]]


# ---- mistakes -----------------------------------------------------------------------------------

THREE = {"embed": np.zeros((5, 2)), "trunk": np.zeros((2, 2)), "head": np.zeros(2)}
OF_THREE = ["embed", "trunk", "head"]
BY_GROUPS: dict[str, Any] = {
    "layer_decay": lambda groups: recipes.layer_decay(THREE, 0.5, groups),
    "discriminative": lambda groups: recipes.discriminative(THREE, 0.1, 1, groups),
    "freeze_to": lambda groups: recipes.freeze_to(THREE, 0, groups),
    "gradual_unfreezing": lambda groups: recipes.gradual_unfreezing(THREE, groups, 5),
    "unfreezing_stages": lambda groups: recipes.unfreezing_stages(THREE, groups),
    "progressive_freezing": lambda groups: recipes.progressive_freezing(THREE, groups, 50),
}
BAD_GROUPS: dict[str, tuple[Any, type[lm.LrmultError], tuple[str, ...]]] = {
    "forgotten": (["embed", "head"], lm.RuleError, ("'trunk' belongs to no group", "... as a")),
    "two forgotten": (["head"], lm.RuleError, ("'embed' and 'trunk' belong to no group",)),
    "in part": (
        [lm.rows("embed", 0), "trunk", "head"],
        lm.RuleError,
        ("'embed' belongs to no group, wholly or in part",),
    ),
    "none": ([], lm.RuleError, ("belong to no group",)),
    "empty": ([[], [], []], lm.RuleError, ("belong to no group",)),
    "typo": (["embed", "trnk", "head"], lm.UnmatchedRuleError, ("'trnk'", "'trunk'")),
    "twice": (["embed", "trunk", "head", "trunk"], lm.ShadowedRuleError, ("rule 3 ('trunk'",)),
    "rest first": ([..., "head"], lm.ShadowedRuleError, ("rule 1 ('head'",)),
    "text": ("embed", lm.RuleError, ("is 'embed'", "a list")),
    "null": (None, lm.RuleError, ("is None", "a list")),
    "number": (3, lm.RuleError, ("is 3", "a list")),
    "everything": (..., lm.RuleError, ("is Ellipsis", "a list")),
    "a target": (lm.rows("embed", 0), lm.RuleError, ("a list",)),
    "of null": (["embed", None, "head"], lm.RuleError, ("has None in it", "write []")),
    "of true": (["embed", True, "head"], lm.PatternError, ("True",)),
    "of numbers": ([0.5, "trunk", "head"], lm.PatternError, ("0.5",)),
    "malformed": (["embed[", "trunk", "head"], lm.PatternError, ("never closed",)),
    "lists of lists": ([[["embed"]], "trunk", "head"], lm.LrmultError, ("['embed']",)),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
@pytest.mark.parametrize("recipe", BY_GROUPS)
def test_groups_that_are_none(recipe, name):
    groups, error, says = BAD_GROUPS[name]
    with pytest.raises(error) as caught:
        BY_GROUPS[recipe](groups)
    message = str(caught.value)
    assert all(words in message for words in says), message
    if name not in ("text", "null", "of null", "number", "everything", "a target"):
        assert message.startswith(f"{recipe}: ")


NAN, INF, HUGE = float("nan"), float("inf"), 10**400
NO_RATES = [0, -1, NAN, INF, HUGE, True, None, "0.5", 1j, [0.5], jnp.ones(2)]
BAD_NUMBERS: dict[str, tuple[Any, list[Any]]] = {
    "layer_decay: decay": (lambda x: recipes.layer_decay(THREE, x, OF_THREE), NO_RATES),
    "layer_decay: ": (lambda x: recipes.layer_decay(THREE, x, OF_THREE), [1e-200, 1e200]),
    "discriminative: lo": (
        lambda x: recipes.discriminative(THREE, x, 1, OF_THREE),
        [each for each in NO_RATES if each is not None],
    ),
    "discriminative: ": (lambda x: recipes.discriminative(THREE, None, x, OF_THREE), NO_RATES),
    "discriminative: hi": (lambda x: recipes.discriminative(THREE, 1, x, OF_THREE), NO_RATES),
    "freeze_to: n": (
        lambda x: recipes.freeze_to(THREE, x, OF_THREE),
        [4, -4, 1.0, True, None, "1", HUGE, NAN, [1], slice(1)],
    ),
    "gradual_unfreezing: every": (
        lambda x: recipes.gradual_unfreezing(THREE, OF_THREE, x),
        [0, -1, 1.5, True, None, "10", [10], [1, 2, 3], [2, 1], ["a", 1], [None, None], {1: 2}],
    ),
    "During": (
        lambda x: recipes.gradual_unfreezing(THREE, OF_THREE, x),
        [[-2, 1]],
    ),
    "gradual_unfreezing: ": (
        lambda x: recipes.gradual_unfreezing(THREE, OF_THREE, 5, multipliers=x),
        [5, [1, 1], [1] * 4, True, [], {}, 0.5],
    ),
    "unfreezing_stages: ": (
        lambda x: recipes.unfreezing_stages(THREE, OF_THREE, multipliers=x),
        [5, [1, 1], [1] * 4, True, [], [1, 1, NAN], [1, True, 1], [1, "a", 1]],
    ),
    "progressive_freezing: steps": (
        lambda x: recipes.progressive_freezing(THREE, OF_THREE, x),
        [0, -1, 10.0, True, None, "10", NAN, [10]],
    ),
    "progressive_freezing: start": (
        lambda x: recipes.progressive_freezing(THREE, OF_THREE, 10, start=x),
        [-0.1, 1, 1.5, NAN, True, None, "0.5", HUGE],
    ),
    "progressive_freezing: level": (
        lambda x: recipes.progressive_freezing(THREE, OF_THREE, 10, level=x),
        [-0.1, 1.1, NAN, True, None, "0.5", HUGE],
    ),
    "lora_plus: ratio": (lambda x: recipes.lora_plus(THREE, x, a="embed", b="trunk"), NO_RATES),
    "linear_probe: ": (
        lambda x: recipes.linear_probe(THREE, x),
        ["hed", True, 0.5, "a[", ["head", "hed"], ["head", "head"]],
    ),
    "bitfit: ": (lambda x: recipes.bitfit(THREE, biases=x), ["hed", True, 0.5, ["a["], "**/bias"]),
    "norms_only: ": (lambda x: recipes.norms_only(THREE, norms=x), ["hed", True, 0.5, ["a["]]),
    "new_tokens: ": (
        lambda x: recipes.new_tokens(THREE, "embed", x),
        [5, [9], slice(5, 9), [], [False] * 5, [True] * 4],
    ),
    "rows": (
        lambda x: recipes.new_tokens(THREE, "embed", x),
        [None, True, "5", 1.5, [1.5], [[1]], {1}, [0, True]],
    ),
}
EVERY_BAD_NUMBER = [
    pytest.param(name, value, id=f"{name} {value!r}"[:60])
    for name, (_, bad) in BAD_NUMBERS.items()
    for value in bad
]


@pytest.mark.parametrize(("name", "value"), EVERY_BAD_NUMBER)
def test_numbers_out_of_range(name, value):
    with pytest.raises(lm.LrmultError) as caught:
        BAD_NUMBERS[name][0](value)
    message = str(caught.value)
    assert name in message, message
    assert len(message) < 700
    assert "\n" not in message


def test_what_can_be_written_is_read():
    """The edges of what is allowed, and numbers of other kinds."""
    for decay in (np.float32(0.5), fractions.Fraction(1, 2), 1e-100, 1):
        recipes.layer_decay(THREE, decay, OF_THREE)
    for every in (np.int64(3), 1, (1, 1), [0, 0], [np.int32(2), 5]):
        rules = recipes.gradual_unfreezing(THREE, OF_THREE, every)
        assert rules[-1].multiplier == 1
    for start, level in ((0, 0), (np.float32(0.5), 1), (fractions.Fraction(1, 3), 0.5)):
        recipes.progressive_freezing(THREE, OF_THREE, np.int64(10), start=start, level=level)
    none = recipes.progressive_freezing(THREE, OF_THREE, 10, level=0)
    assert none == lm.optional([(each, 1) for each in OF_THREE])
    assert recipes.gradual_unfreezing(THREE, OF_THREE, [0, 0]) == none


# ---- optional -----------------------------------------------------------------------------------

FIVE = {
    "embed": {"embedding": np.zeros((5, 2))},
    "layers": [{"kernel": np.zeros((2, 2)), "bias": np.zeros(2)} for _ in range(2)],
    "norm": {"scale": np.zeros(2)},
    "lora": {"lora_a": np.zeros((2, 1)), "lora_b": np.zeros((1, 2))},
    "head": {"kernel": np.zeros((2, 3))},
}
OF_FIVE = ["embed", "layers[0]", "layers[1]", ["norm", "lora", "head"]]
EVERY: dict[str, Any] = {
    "bitfit": lambda: recipes.bitfit(FIVE, head="head"),
    "discriminative": lambda: recipes.discriminative(FIVE, 0.1, 1, OF_FIVE),
    "freeze_to": lambda: recipes.freeze_to(FIVE, 3, OF_FIVE),
    "gradual_unfreezing": lambda: recipes.gradual_unfreezing(FIVE, OF_FIVE, 5),
    "layer_decay": lambda: recipes.layer_decay(FIVE, 0.5, OF_FIVE),
    "linear_probe": lambda: recipes.linear_probe(FIVE, "head"),
    "lora_plus": lambda: recipes.lora_plus(FIVE, head="head"),
    "mup": lambda: recipes.mup(FIVE, jax.tree.map(lambda x: x[..., :1], FIVE), "sgd"),
    "new_tokens": lambda: recipes.new_tokens(FIVE, "embed", [1, 2], head="head"),
    "norms_only": lambda: recipes.norms_only(FIVE, head="head"),
    "progressive_freezing": lambda: recipes.progressive_freezing(FIVE, OF_FIVE, 50),
    "unfreezing_stages": lambda: recipes.unfreezing_stages(FIVE, OF_FIVE)[1],
}


def test_every_recipe_is_here():
    assert EVERY.keys() == {*recipes.__all__} - {"depths"}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "override",
    [
        [("head", None)],
        [("**", 0.3)],
        [(lm.rows("embed/embedding", 0), 7), ("layers", -1)],
        [(each, 2) for each in ("embed", "layers", "norm", "lora", "head")],
    ],
)
def test_overriding_rules_raise_nothing(name, override):
    rules = EVERY[name]()
    assert isinstance(rules, lm.Rules)
    assert all(rule.optional for rule in rules)
    plain, both, front = (
        lm.compile_rules(at(each, 3), FIVE) for each in (rules, override + rules, override)
    )
    for below, above, first in zip(plain.leaves, both.leaves, front.leaves, strict=True):

        def dense(leaf):
            return np.broadcast_to(np.asarray(leaf.multiplier, float), leaf.shape)

        claimed = np.full(first.shape, bool(first.rules))
        if first.path == "embed/embedding" and len(override) == 2:
            claimed[1:] = False
        np.testing.assert_array_equal(dense(above), np.where(claimed, dense(first), dense(below)))


@pytest.mark.parametrize("name", EVERY)
def test_recipes_serve_another_model(name):
    """What they return is optional: none of it need be there."""
    lm.compile_rules(at(EVERY[name](), 0), {"other": np.zeros(3)})


@pytest.mark.parametrize("name", EVERY)
def test_recipes_take_no_values(name):
    """Shapes are enough, and numbers of any container."""
    shapes = jax.eval_shape(lambda: FIVE)
    calls = {
        "bitfit": lambda p: recipes.bitfit(p, head="head"),
        "norms_only": lambda p: recipes.norms_only(p, head="head"),
        "lora_plus": lambda p: recipes.lora_plus(p, head="head"),
        "layer_decay": lambda p: recipes.layer_decay(p, 0.5, OF_FIVE),
    }
    if name in calls:
        assert calls[name](shapes) == EVERY[name]()
    assert hash(EVERY[name]()) == hash(EVERY[name]())  # and equal rules every time
    assert EVERY[name]() == EVERY[name]()


def test_what_stands_beside_a_scale_is_no_norm():
    layer = {"kernel": jnp.ones((2, 2))}
    attention = {"scale": jnp.ones(2), "query": layer}
    params = {"attention": attention, "norm": {"scale": jnp.ones(2)}}
    assert recipes.norms_only(params) == lm.optional([("norm", 1), (..., None)])


@pytest.mark.parametrize(
    "call",
    [
        lambda params: recipes.linear_probe(params, None),
        lambda params: recipes.linear_probe(params, []),
        lambda params: recipes.bitfit(params, biases=[]),
        lambda params: recipes.new_tokens(params, [], 0),
    ],
)
def test_nothing_to_train_is_an_error(call):
    with pytest.raises(lm.RuleError, match="nothing is named that is to train"):
        call({"w": jnp.ones(3), "bias": jnp.ones(2)})


def test_all_biases_in_the_head():
    params = {"trunk": jnp.ones(3), "head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    with pytest.raises(
        lm.ShadowedRuleError, match="bitfit: there is nothing for it to train outside"
    ):
        recipes.bitfit(params, head="head")


def test_outputs_of_the_base_model_and_their_biases():
    def shapes(width):
        return tree_of({"mid/kernel": (width, width), "head/kernel": (width, 4), "head/bias": (4,)})

    base = shapes(16)
    assert set(values(recipes.mup(base, base, output="head/kernel"), base).values()) == {1}
    wide = shapes(32)
    found = values(recipes.mup(wide, base, output="head"), wide)
    assert found == {"head/bias": 1, "head/kernel": 0.5, "mid/kernel": 0.5}


def test_heads_that_grow_by_another_ratio():
    def shapes(width, heads):
        return tree_of({"query/kernel": (width, heads, 8), "query/bias": (heads, 8)})

    found = values(recipes.mup(shapes(64, 4), shapes(16, 2)), shapes(64, 4))
    assert found == {"query/bias": 1, "query/kernel": 0.25}
    found = values(recipes.mup(shapes(64, 4), shapes(16, 2), "sgd"), shapes(64, 4))
    assert found == {"query/bias": 2, "query/kernel": 0.5}


def test_arrays_of_numbers():
    params = tree_of({"a": (2,), "b": (2,), "c": (2,)})
    groups = ["a", "b", "c"]
    given = np.array([10, 20]), np.array([0.25, 0.5, 1.0])
    assert recipes.gradual_unfreezing(
        params, groups, given[0], multipliers=given[1]
    ) == recipes.gradual_unfreezing(params, groups, [10, 20], multipliers=[0.25, 0.5, 1.0])
    assert recipes.layer_decay(params, jnp.float32(0.5), groups) == recipes.layer_decay(
        params, 0.5, groups
    )


def test_what_goes_with_the_last_layer():
    params = {"blocks": [jnp.ones(2), jnp.ones(3)], "norm": jnp.ones(1), "head": jnp.ones(2)}
    groups = recipes.depths(params, "blocks", with_last="norm", above=["head"])
    assert groups == [["blocks/0"], ["blocks/1", "norm"], ["head"]]
    table = {"stack": "blocks", "with_last": "norm"}
    for depths in ({**table, "above": ["head"]}, [table, "head"]):
        item = {"recipe": "layer_decay", "decay": 0.5, "depths": depths}
        assert lm.Rules.from_dict([item], params) == recipes.layer_decay(params, 0.5, groups)
