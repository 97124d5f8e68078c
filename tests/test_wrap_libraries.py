"""`wrap`, `migrate` and `stop_frozen` in real libraries: numbers, not only that nothing raises."""

import dataclasses
import functools
from typing import NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze
from flax.training.train_state import TrainState

import lrmult as lm
from tests.flags import OPTIONS

# One model in every library: `trunk` is frozen, half of the neurons of `part`, and `head` is slow.
KEPT = np.array([1, 3])
FROZEN = [("trunk", None), (lm.neurons("part", [0, 2]), None)]
SLOW = [("head", 0.5)]
RULES = lm.Rules([*FROZEN, *SLOW])
NAMES = ("trunk", "part", "head")
X = jax.random.normal(jax.random.key(100), (6, 4))
Y = jax.random.normal(jax.random.key(101), (6, 4))
both_forms = pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])


def forms(names, compact_too):
    """All by name in the full form, and some in the compact form."""
    cases = [(name, False) for name in names] + [(name, True) for name in compact_too]
    ids = [f"{name}-{'compact' if compact else 'full'}" for name, compact in cases]
    return pytest.mark.parametrize(("name", "compact"), cases, ids=ids)


@functools.cache
def start():
    def leaf(seed, shape):
        values = jax.random.normal(jax.random.key(seed), shape)
        return np.asarray(jnp.where(values > 1, -0.0, values))

    return {
        name: {"kernel": leaf(i, (4, 4)), "bias": leaf(10 + i, (4,))}
        for i, name in enumerate(NAMES)
    }


def make_params():
    """Fresh arrays, since some are donated."""
    return jax.tree.map(jnp.array, start())


def apply(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x


def loss_of(params, x=X):
    return jnp.mean((apply(params, x) - Y) ** 2)


def trained(tree):
    """What of a tree trains."""
    part = jax.tree.map(lambda a: a[..., KEPT], tree["part"])
    return {"part": part, "head": tree["head"]}


def splice(small, tree):
    """A tree with what trains from another."""
    part = jax.tree.map(lambda a, new: a.at[..., KEPT].set(new), tree["part"], small["part"])
    return tree | {"part": part, "head": small["head"]}


def frozen_parts(tree):
    """Where a tree like the parameters is frozen."""
    return jax.tree.map(
        lambda kept: kept == 0,
        splice(jax.tree.map(jnp.ones_like, trained(tree)), jax.tree.map(jnp.zeros_like, tree)),
    )


WHERE_FROZEN = frozen_parts(make_params())


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


class Step:
    """A jitted step that counts how often it is traced."""

    def __init__(self, tx, grads=None, **options):
        self.traces = 0

        def step(params, state, i):
            self.traces += 1
            updates, state = tx.update((grads or full_grads)(params, i), state, params)
            return optax.apply_updates(params, updates), state

        self.jitted = jax.jit(step, **{"compiler_options": OPTIONS} | options)

    def run(self, params, state, steps):
        for i in steps:
            params, state = self.jitted(params, state, i)
        return params, state


def train(tx, params, grads, steps=5, state=None):
    step = Step(tx, grads)
    params, state = step.run(params, tx.init(params) if state is None else state, range(steps))
    assert step.traces == 1
    return params, state


def alone(optimizer, steps=5, grads=None, state=None, rules=SLOW):
    """What an optimizer makes of the part that trains, by itself."""
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    tx = optax.chain(optimizer, lm.scale_by_rules(rules))
    return train(tx, trained(make_params()), grads or small_grads, steps, state)


def small_grads(params, i):
    return jax.tree.map(lambda p: jnp.cos(3 * p + i), params)


def full_grads(params, i):
    """The same for what trains; NaN for what is frozen."""
    grads = small_grads(params, i)
    return jax.tree.map(lambda g, here: jnp.where(here, jnp.nan, g), grads, WHERE_FROZEN)


@functools.cache
def adamw_alone(steps=5):
    return alone(adamw(), steps)[0]


def adamw(rate=1e-2, **kwargs):
    return optax.adamw(rate, eps=1e-3, weight_decay=0.1, **kwargs)


def injected():
    return optax.inject_hyperparams(lambda rate: adamw(rate))(rate=1e-2)


def close(found, wanted, rtol=2e-6, atol=1e-7):
    chex.assert_trees_all_close(found, wanted, rtol=rtol, atol=atol)
    chex.assert_trees_all_equal_dtypes(found, wanted)


def check(params, wanted=None, rtol=2e-6):
    """Parameters after training, against what the part that trains becomes alone."""
    wanted = adamw_alone() if wanted is None else wanted
    close(trained(params), wanted, rtol)
    lm.assert_frozen(make_params(), jax.tree.map(jnp.asarray, params), RULES)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), trained(make_params()), wanted)
    assert all(jax.tree.leaves(moved))


# Inside: what it wraps --------------------------------------------------------------------------


def decayed(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


def like_params(value):
    return {name: {"kernel": value("kernel"), "bias": value("bias")} for name in NAMES}


def clipped(optimizer):
    return optax.chain(optax.clip_by_global_norm(0.05), optimizer)


def momentum(rate=0.1):
    return optax.sgd(rate, momentum=0.9)


# The optimizer, and what it is without the parts that train not, where masks are trees.
INSIDE = {
    "adamw": lambda _: adamw(),
    "MultiSteps": lambda _: optax.MultiSteps(adamw(), 2),
    "MultiSteps as a transformation": lambda _: optax.MultiSteps(
        adamw(), 2
    ).gradient_transformation(),
    "apply_if_finite": lambda _: optax.apply_if_finite(adamw(), 2),
    "clip": lambda _: clipped(momentum()),
    "inject_hyperparams": lambda _: injected(),
    "adamw, mask function": lambda _: adamw(mask=decayed),
    "adamw, mask tree": lambda cut: adamw(mask=cut(like_params(lambda name: name == "kernel"))),
    "masked": lambda _: optax.chain(momentum(), optax.masked(optax.trace(0.5), decayed)),
    "masked, tree": lambda cut: optax.masked(
        adamw(), cut(like_params(lambda name: name == "kernel"))
    ),
    "partition": lambda cut: optax.partition(
        {"kernel": adamw(), "bias": momentum()}, cut(like_params(str))
    ),
    "partition, labels by a function": lambda _: optax.partition(
        {2: adamw(), 1: momentum()}, lambda params: jax.tree.map(jnp.ndim, params)
    ),
    "schedule": lambda _: adamw(optax.linear_schedule(1e-2, 1e-3, 4)),
    "schedule_free": lambda _: optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9),
}


def cut_tree(tree):
    return {"part": tree["part"], "head": tree["head"]}


@forms(INSIDE, ["MultiSteps", "clip", "adamw, mask tree", "masked", "partition", "schedule_free"])
def test_inside(name, compact):
    tx = lm.wrap(INSIDE[name](lambda tree: tree), RULES, compact=compact)
    params, state = train(tx, make_params(), full_grads)
    check(params, alone_inside(name))
    shapes = jax.eval_shape(tx.init, make_params())
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(leaf).all()  # NaN gradients of what is frozen are nowhere
    # optax calls `init` with a placeholder here.
    doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(doubled, state)


@functools.cache
def alone_inside(name):
    return alone(INSIDE[name](cut_tree))[0]


def test_frozen_gradients_are_not_counted_in_the_norm():
    """The bound is between the norm of what trains, and that of all."""
    grads = make_params()
    norm = optax.tree.norm(trained(grads))
    optimizer = optax.chain(optax.clip_by_global_norm(1.01 * norm), optax.sgd(1.0))
    params = make_params()
    inside = lm.wrap(optimizer, FROZEN)
    updates, _ = inside.update(grads, inside.init(params), params)
    close(trained(updates), jax.tree.map(jnp.negative, trained(grads)))
    outside = optax.chain(optax.clip_by_global_norm(1.01 * norm), lm.wrap(optax.sgd(1.0), FROZEN))
    updates, _ = outside.update(grads, outside.init(params), params)
    factor = 1.01 * norm / optax.tree.norm(grads)
    assert factor < 0.9
    close(trained(updates), jax.tree.map(lambda g: -factor * g, trained(grads)))


def test_inside_a_learning_rate_can_be_set_in_the_state():
    optimizer, slower = injected(), jnp.float32(1e-3)
    tx = lm.wrap(optimizer, RULES, compact=True)
    step = Step(tx)
    params, state = step.run(make_params(), tx.init(make_params()), range(2))
    state = optax.tree.set(state, rate=slower)
    params, _ = step.run(params, state, range(2, 4))
    assert step.traces == 1
    first, state = alone(optimizer, 2)
    tx = optax.chain(optimizer, lm.scale_by_rules(SLOW))
    state = optax.tree.set(state, rate=slower)
    wanted, _ = train(tx, first, lambda p, i: small_grads(p, i + 2), 2, state)
    check(params, wanted)
    with pytest.raises(AssertionError):
        check(params, adamw_alone(4))


@functools.cache
def broken_alone():
    return alone(optax.apply_if_finite(adamw(), 5), 4, broken(small_grads))[0]


def broken(grads):
    """Every other gradient is NaN where it trains."""

    def of(params, i):
        found = grads(params, i)
        bad = jnp.where(i % 2 == 0, jnp.nan, 1.0)
        return found | {"head": jax.tree.map(lambda g: g * bad, found["head"])}

    return of


@both_forms
def test_inside_apply_if_finite_sees_what_trains_alone(compact):
    tx = lm.wrap(optax.apply_if_finite(adamw(), 5), RULES, compact=compact)
    params, state = train(tx, make_params(), broken(full_grads), 4)
    check(params, broken_alone())
    assert optax.tree.get(state, "total_notfinite") == 2
    assert optax.tree.get(state, "count") == 2


def test_what_optax_finds_in_the_state():
    tx = lm.wrap(adamw(), RULES)
    _, state = train(tx, make_params(), full_grads, 3)
    assert optax.tree.get(state, "count") == 3
    assert optax.tree.get(state, "mu")["trunk"] == {
        "kernel": optax.MaskedNode(),
        "bias": optax.MaskedNode(),
    }
    reset = optax.tree.map_params(
        tx, jnp.zeros_like, state, transform_non_params=lambda leaf: leaf + 10
    )
    assert optax.tree.get(reset, "count") == 13
    assert not any(leaf.any() for leaf in jax.tree.leaves(optax.tree.get(reset, "mu")))
    assert optax.tree.get(reset, "nu")["head"]["bias"].shape == (4,)


# Outside: what wraps it -------------------------------------------------------------------------


def only(*names):
    return lambda params: {
        n: jax.tree.map(lambda _, inside=n in names: inside, params[n]) for n in params
    }


# How a transformation made of a learning rate is wrapped, here and for what trains alone.
OUTSIDE = {
    "MultiSteps": lambda make, names: optax.MultiSteps(make(1e-2), 2).gradient_transformation(),
    "apply_if_finite": lambda make, names: optax.apply_if_finite(make(1e-2), 2),
    "inject_hyperparams": lambda make, names: optax.inject_hyperparams(make)(rate=1e-2),
    "masked": lambda make, names: optax.masked(make(1e-2), only("trunk", "part")),
    "partition": lambda make, names: optax.partition(
        {"ruled": make(1e-2), "plain": optax.sgd(0.1)},
        {n: "plain" if n == "head" else "ruled" for n in names},
    ),
    "a chain": lambda make, names: optax.chain(make(1e-2), optax.scale(2.0)),
    "named_chain": lambda make, names: optax.named_chain(
        ("a", make(1e-2)), ("b", optax.identity())
    ),
    "wrap": lambda make, names: lm.wrap(make(1e-2), [("part/bias", 3)]),
}


@functools.cache
def alone_outside(name):
    def make(rate):
        return optax.chain(adamw(rate), lm.scale_by_rules(SLOW))

    tx = OUTSIDE[name](make, NAMES[1:])
    return alone(tx, rules=[])[0]


@forms(OUTSIDE, ["MultiSteps", "masked", "partition", "wrap"])
def test_outside(name, compact):
    tx = OUTSIDE[name](lambda rate: lm.wrap(adamw(rate), RULES, compact=compact), NAMES)
    params, state = train(tx, make_params(), small_grads)
    close(trained(params), alone_outside(name))
    frozen = jax.tree.map(lambda p, here: p[here], params, WHERE_FROZEN)
    start = jax.tree.map(lambda p, here: p[here], make_params(), WHERE_FROZEN)
    chex.assert_trees_all_equal(frozen, start)  # some of these add a positive zero
    doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(doubled, state)


def test_inject_hyperparams_sets_multipliers():
    def make(head, rate):
        return lm.wrap(adamw(rate), [*FROZEN, ("head", head)])

    tx = optax.inject_hyperparams(make)(head=4.0, rate=1e-2)
    state = tx.init(make_params())
    step = Step(tx)
    state.hyperparams["head"] = jnp.float32(0.5)
    params, state = step.run(make_params(), state, range(5))
    assert step.traces == 1
    check(params)
    state.hyperparams["head"] = jnp.float32(0.0)
    then, _ = step.run(params, state, [5])
    assert bits(then["head"]) == bits(params["head"])
    assert bits(then["part"]) != bits(params["part"])
    assert step.traces == 1


def test_around_wrap_lookahead_moves_what_trains():
    def run(tx, params):
        pair = optax.LookaheadParams.init_synced(params)
        step = Step(tx, lambda pair, i: small_grads(pair.fast, i))
        pair, _ = step.run(pair, tx.init(pair), range(5))
        assert step.traces == 1
        return pair

    tx = optax.lookahead(lm.wrap(adamw(), RULES), 2, 0.5)
    pair = run(tx, make_params())
    tx = optax.lookahead(optax.chain(adamw(), lm.scale_by_rules(SLOW)), 2, 0.5)
    wanted = run(tx, trained(make_params()))
    close(trained(pair.fast), wanted.fast)
    close(trained(pair.slow), wanted.slow)
    chex.assert_trees_all_equal(pair.slow["trunk"], make_params()["trunk"])


def test_wrap_inside_wrap_multiplies():
    tx = lm.wrap(
        lm.wrap(adamw(), [("part", 2), ("head", 0.25)]), [*FROZEN, ("part", 0.5), ("head", 2)]
    )
    params, _ = train(tx, make_params(), full_grads)
    check(params)


@both_forms
def test_schedules_as_multipliers(compact):
    ramp = optax.linear_schedule(0.0, 1.0, 4)
    rules = [("head", ramp), ("part/bias", lambda step: 3.0 - step)]
    tx = lm.wrap(optax.MultiSteps(adamw(), 2), [*FROZEN, *rules], compact=compact)
    params, state = train(tx, make_params(), full_grads)
    check(params, alone(optax.MultiSteps(adamw(), 2), rules=rules)[0])
    assert state.rules_state.rules_step == 5


def test_element_masks():
    masks = {n: np.random.default_rng(i).random((4, 4)) < 0.5 for i, n in enumerate(NAMES)}
    rules = [(lm.elements(f"{n}/kernel", mask), None) for n, mask in masks.items()]
    rules.append(("trunk", 0.5))

    def grads(params, i):
        found = small_grads(params, i)
        for n, mask in masks.items():
            found[n]["kernel"] = jnp.where(mask, jnp.nan, found[n]["kernel"])
        return found

    wanted, _ = train(
        optax.chain(adamw(), lm.scale_by_rules([("trunk", 0.5)])), make_params(), small_grads
    )
    for compact in (False, True):
        params, state = train(lm.wrap(adamw(), rules, compact=compact), make_params(), grads)
        lm.assert_frozen(make_params(), params, rules)
        for name, mask in masks.items():
            close(params[name]["kernel"][~mask], wanted[name]["kernel"][~mask])
            close(params[name]["bias"], wanted[name]["bias"])
        assert {m.dtype for m in state.rules_state.rules_masks} == {jnp.dtype("uint8")}


# Transformations of JAX -------------------------------------------------------------------------


def test_vmap_over_runs():
    rates = jnp.array([1e-2, 3e-2])

    @jax.jit
    @jax.vmap
    def run(params, rate):
        tx = lm.wrap(adamw(rate), RULES, compact=True)

        def body(carry, i):
            params, state = carry
            updates, state = tx.update(full_grads(params, i), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(5))[0]

    many = jax.tree.map(lambda p: jnp.stack([p, p]), make_params())
    together, state = run(many, rates)
    check(jax.tree.map(lambda p: p[0], together))
    check(jax.tree.map(lambda p: p[1], together), alone(adamw(3e-2))[0])
    assert state.inner_state[0].mu["part"]["bias"].shape == (2, 2)


@both_forms
def test_eager_steps(compact):
    tx = lm.wrap(adamw(), RULES, compact=compact)
    params, state = make_params(), tx.init(make_params())
    for i in range(5):
        updates, state = tx.update(full_grads(params, i), state, params)
        params = optax.apply_updates(params, updates)
    check(params)


@both_forms
def test_donated_steps(compact):
    tx = lm.wrap(adamw(), RULES, compact=compact)
    step = Step(tx, donate_argnums=(0, 1), compiler_options={})
    params = make_params()
    state = tx.init(params)
    first = state.inner_state[0].mu["head"]["kernel"]
    params, state = step.run(params, state, range(5))
    check(params)
    assert step.traces == 1
    assert first.is_deleted()


@both_forms
def test_without_params(compact):
    params = make_params()
    tx = lm.wrap(optax.adam(0.1), RULES, compact=compact)
    update = jax.jit(tx.update)
    updates, state = update(full_grads(params, 0), tx.init(params))
    updates, state = update(full_grads(params, 1), state)
    assert update._cache_size() == 1
    tx = optax.chain(optax.adam(0.1), lm.scale_by_rules(SLOW))
    small = trained(params)
    _, state = tx.update(small_grads(small, 0), tx.init(small))
    wanted, _ = tx.update(small_grads(small, 1), state)
    close(trained(updates), wanted)
    for leaf, here in zip(*map(jax.tree.leaves, (updates, WHERE_FROZEN)), strict=True):
        assert bits(leaf[here]) == bits(np.full(here.sum(), -0.0, np.float32))


# Extra arguments --------------------------------------------------------------------------------

EXTRA = {
    "lbfgs": (
        lambda: optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(15)),
        ("value", "grad", "value_fn", "x"),
    ),
    "zoom": (
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(5)),
        ("value", "grad", "value_fn", "x"),
    ),
    "polyak_sgd": (lambda: optax.polyak_sgd(0.1), ("value",)),
    "momo": (lambda: optax.contrib.momo(0.1), ("value",)),
    "sophia": (lambda: optax.contrib.sophia(1e-2, update_interval=2), ("obj_fn",)),
    "plateau": (
        lambda: optax.chain(
            optax.sgd(0.1), optax.contrib.reduce_on_plateau(0.5, 0, accumulation_size=2, atol=1.0)
        ),
        ("value",),
    ),
}


def descend(tx, names, params, loss, spoil=lambda grads: grads):
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params, x=X)
        grad = spoil(grad)
        known = {"value": value, "grad": grad, "value_fn": loss, "x": X}
        known["obj_fn"] = lambda params: loss(params, x=X)
        extra = {name: known[name] for name in names}
        updates, state = tx.update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, compiler_options=OPTIONS)
    # Line searches start with weak types.
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), tx.init(params))
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1
    return params


def partial_loss(small, x):
    return loss_of(splice(small, make_params()), x)


@functools.cache
def descended(name):
    make, names = EXTRA[name]
    tx = optax.with_extra_args_support(make())
    return descend(tx, names, trained(make_params()), partial_loss)


# The random signs of sophia depend on shapes: the oracle has those of the compact form.
@forms([name for name in EXTRA if name != "sophia"], ["lbfgs", "sophia"])
def test_extra_arguments(name, compact):
    make, names = EXTRA[name]
    tx = lm.wrap(make(), FROZEN, compact=compact)

    def spoil(grads):
        return jax.tree.map(lambda g, here: jnp.where(here, jnp.nan, g), grads, WHERE_FROZEN)

    params = descend(tx, names, make_params(), loss_of, spoil)
    close(trained(params), descended(name), rtol=1e-3, atol=1e-5)
    lm.assert_frozen(make_params(), params, FROZEN)
    assert loss_of(params) < loss_of(make_params())


# Libraries --------------------------------------------------------------------------------------


@functools.cache
def net_alone():
    """The part that trains, trained by itself on the gradients of the network."""

    def grads(small, i):
        return jax.grad(partial_loss)(small, X)

    return train(optax.chain(adamw(), lm.scale_by_rules(SLOW)), trained(make_params()), grads, 3)[0]


class Linen(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        for name in NAMES:
            kernel = nn.with_partitioning(init, ("in", "out")) if self.boxed else init
            x = jnp.tanh(nn.Dense(4, kernel_init=kernel, name=name)(x))
        return x


@pytest.mark.parametrize(
    ("kind", "compact"),
    [("dict", False), ("FrozenDict", True), ("boxed", False), ("boxed", True)],
)
def test_linen_train_state(kind, compact):
    model = Linen(kind == "boxed")
    params = make_params()
    if kind == "FrozenDict":
        params = freeze(params)
    if kind == "boxed":
        params = model.init(jax.random.key(0), X)["params"]
        leaves = jax.tree.leaves(make_params())
        params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    tx = lm.wrap(adamw(), RULES, compact=compact)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    traces = []

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=OPTIONS)
    def step(state):
        traces.append(0)
        grads = jax.grad(lambda params: jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2))(
            state.params
        )
        return state.apply_gradients(grads=grads)

    for _ in range(3):
        state = step(state)
    assert len(traces) == 1
    assert state.step == 3
    assert isinstance(state.params, FrozenDict) == (kind == "FrozenDict")
    check(nn.unbox(unfreeze(state.params)), net_alone(), rtol=2e-5)
    if kind == "boxed":
        specs = nn.get_partition_spec(jax.eval_shape(tx.init, state.params))
        moments = specs.inner_state[0].mu
        assert moments["head"]["kernel"] == jax.sharding.PartitionSpec("in", "out")
        assert isinstance(moments["head"]["bias"], jax.sharding.PartitionSpec)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(nn.Dense(4)(x)), None

        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return nn.Dense(4, name="head")(scanned(name="layers")(x, None)[0])


@both_forms
def test_linen_scan(compact):
    model = Stack()
    start = model.init(jax.random.key(0), X)["params"]
    rules = [("layers[:2]", None), ("layers[2]", 0.5), ("head/bias", None)]
    tx = lm.wrap(adamw(), rules, compact=compact, structure=lm.Structure(stacked={"layers": 0}))

    def grads(params, i):
        return jax.grad(lambda p: jnp.mean((model.apply({"params": p}, X) - Y) ** 2))(params)

    params, state = train(tx, start, grads, 3)
    layers = jax.tree.map(lambda p: p[2:], start["layers"])
    small = {
        "half": jax.tree.map(lambda p: p[:1], layers),
        "full": jax.tree.map(lambda p: p[1:], layers),
    }
    small["head"] = {"kernel": start["head"]["kernel"]}

    def small_grads(small, i):
        def loss(small):
            layers = jax.tree.map(
                lambda a, *b: jnp.concatenate([a[:2], *b]),
                start["layers"],
                small["half"],
                small["full"],
            )
            full = {"layers": layers, "head": small["head"] | {"bias": start["head"]["bias"]}}
            return jnp.mean((model.apply({"params": full}, X) - Y) ** 2)

        return jax.grad(loss)(small)

    wanted, _ = train(
        optax.chain(adamw(), lm.scale_by_rules([("half", 0.5)])), small, small_grads, 3
    )
    close(jax.tree.map(lambda p: p[2:3], params["layers"]), wanted["half"])
    close(jax.tree.map(lambda p: p[3:], params["layers"]), wanted["full"])
    close(params["head"]["kernel"], wanted["head"]["kernel"])
    lm.assert_frozen(start, params, rules, structure=lm.Structure(stacked={"layers": 0}))
    assert jax.tree.leaves(state.inner_state[0].mu["layers"])[0].shape[0] == (2 if compact else 4)


ZEROS = nnx.initializers.zeros_init()


class Net(nnx.Module):
    def __init__(self, kernel_init=ZEROS):
        rngs = nnx.Rngs(0)
        for name, layer in make_params().items():
            linear = nnx.Linear(4, 4, kernel_init=kernel_init, rngs=rngs)
            linear.kernel[...] = layer["kernel"]
            linear.bias[...] = layer["bias"]
            setattr(self, name, linear)

    def __call__(self, x):
        for name in NAMES:
            x = jnp.tanh(getattr(self, name)(x))
        return x


def net_loss(model):
    return jnp.mean((model(X) - Y) ** 2)


def nnx_step(model, optimizer):
    optimizer.update(model, nnx.grad(net_loss)(model))


def pure(model, wrt=nnx.Param):
    """The arrays by themselves: a module is changed in place."""
    return jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model, wrt)))


@pytest.mark.parametrize(("jit", "compact"), [(False, False), (True, False), (True, True)])
def test_nnx_optimizer(jit, compact):
    model = Net()
    optimizer = nnx.Optimizer(model, lm.wrap(adamw(), RULES, compact=compact), wrt=nnx.Param)
    step = nnx.jit(nnx_step) if jit else nnx_step
    for _ in range(3):
        step(model, optimizer)
    check(pure(model), net_alone(), rtol=2e-5)
    moments = optimizer.opt_state.inner_state[0].mu
    assert moments["part"]["kernel"][...].shape == (4, 2 if compact else 4)
    assert len(jax.tree.leaves(moments)) == 4


@both_forms
def test_nnx_with_sharding_metadata(compact):
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        model = Net(nnx.with_partitioning(ZEROS, ("x", None)))
        optimizer = nnx.Optimizer(model, lm.wrap(adamw(), RULES, compact=compact), wrt=nnx.Param)
        step = nnx.jit(nnx_step)
        for _ in range(3):
            step(model, optimizer)
        check(pure(model), net_alone(), rtol=2e-5)
        moment = optimizer.opt_state.inner_state[0].mu["head"]["kernel"]
        assert moment.get_metadata()["out_sharding"] == ("x", None)
        assert model.head.kernel.get_metadata()["out_sharding"] == ("x", None)


@both_forms
def test_nnx_wrt_a_filter(compact):
    wrt = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("trunk")))
    model = Net()
    optimizer = nnx.Optimizer(model, lm.wrap(adamw(), RULES[1:], compact=compact), wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(net_loss, argnums=nnx.DiffState(0, wrt))(model))

    for _ in range(3):
        step(model, optimizer)
    check(pure(model), net_alone(), rtol=2e-5)


def test_nnx_state_carried_over():
    later = [("head", None), ("part", 2)]
    model = Net()
    old = nnx.Optimizer(model, lm.wrap(adamw(), RULES), wrt=nnx.Param)
    for _ in range(2):
        nnx_step(model, old)
    between = pure(model)
    new = nnx.Optimizer(model, lm.wrap(adamw(), later), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    nnx.update(new.opt_state, nnx.state(lm.migrate(old.opt_state, params, adamw(), RULES, later)))
    step = nnx.jit(nnx_step)
    for _ in range(2):
        step(model, new)
    after = pure(model)

    def run(rules, params, state=None):
        grads = lambda params, i: jax.grad(loss_of)(params)  # noqa: E731
        return train(lm.wrap(adamw(), rules), params, grads, 2, state)

    params, state = run(RULES, make_params())
    close(between, params, rtol=2e-5)
    params, _ = run(later, params, lm.migrate(state, params, adamw(), RULES, later))
    close(after, params, rtol=2e-5)
    lm.assert_frozen(between, after, later)
    assert optax.tree.get(new.opt_state, "count")[...] == 4
    assert bits(after["trunk"]) != bits(between["trunk"])


def test_nnx_states_hold_frozen_subtrees_as_one_node():
    """NNX walks every node of a state in Python, at each call of what it has compiled."""
    optimizer = nnx.Optimizer(Net(), lm.wrap(adamw(), [("trunk", None)]), wrt=nnx.Param)
    assert optimizer.opt_state.inner_state[0].mu["trunk"] == optax.MaskedNode()
    frozen = nnx.Optimizer(Net(), lm.wrap(adamw(), [(..., None)]), wrt=nnx.Param)
    assert optax.tree.get(frozen.opt_state, "mu") == optax.MaskedNode()


def test_nnx_states_of_other_rules():
    lists = [(..., None)], [("trunk", None)], [("head/bias", None), ("part", None)], []
    model = Net()
    params = nnx.state(model, nnx.Param)
    optimizer = nnx.Optimizer(model, lm.wrap(adamw(), []), wrt=nnx.Param)
    nnx_step(model, optimizer)
    whole = optimizer.opt_state
    for old in lists:
        state = lm.migrate(whole, params, adamw(), [], old)
        for rules in lists:
            if rules is old:
                continue
            with pytest.raises(lm.RuleError, match="made for other rules"):
                lm.migrate(state, params, adamw(), rules, [])
            new = lm.migrate(state, params, adamw(), old, rules)
            expected = lm.wrap(adamw(), rules).init(params)
            assert jax.tree.structure(new) == jax.tree.structure(expected)
            assert optax.tree.get(new, "count") == 1


def test_nnx_stop_frozen_of_a_module():
    def loss(model):
        return net_loss(lm.stop_frozen(model, RULES))

    grads = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(Net()))
    wanted = jax.grad(loss_of)(make_params())
    wanted = jax.tree.map(lambda g, here: jnp.where(here, 0, g), wanted, WHERE_FROZEN)
    close(grads, wanted)
    assert abs(grads["part"]["kernel"]).max() > 1e-4


def test_nnx_stop_frozen_keeps_what_the_module_counts():
    """As batch statistics and the counters of random keys do, in the module passed to the loss."""

    class Counting(nnx.Module):
        def __init__(self):
            self.trunk, self.head = nnx.Param(jnp.float32(2)), nnx.Param(jnp.float32(3))
            self.calls = nnx.BatchStat(jnp.float32(0))

        def __call__(self):
            self.calls[...] += 1
            return self.trunk * self.head

    model = Counting()
    for _ in range(2):
        grads = nnx.grad(lambda model: lm.stop_frozen(model, [("trunk", None)])())(model)
        assert (grads["trunk"][...], grads["head"][...]) == (0, 2)
    assert model.calls[...] == 2


class EquinoxNet(eqx.Module):
    trunk: eqx.nn.Linear
    part: eqx.nn.Linear
    head: eqx.nn.Linear
    hole: jax.Array | None
    activation: object
    steps: jax.Array

    def __init__(self):
        params = make_params()
        for name in NAMES:
            linear = eqx.nn.Linear(4, 4, key=jax.random.key(0))
            layer = (params[name]["kernel"].T, params[name]["bias"])
            setattr(self, name, eqx.tree_at(lambda m: (m.weight, m.bias), linear, layer))
        self.hole, self.activation, self.steps = None, jnp.tanh, jnp.arange(3)

    def __call__(self, x):
        for layer in (self.trunk, self.part, self.head):
            x = self.activation(layer(x))
        return x

    def as_dict(self):
        layers = {name: getattr(self, name) for name in NAMES}
        return {n: {"kernel": m.weight.T, "bias": m.bias} for n, m in layers.items()}


def equinox_loss(model):
    return jnp.mean((jax.vmap(model)(X) - Y) ** 2)


@both_forms
def test_equinox(compact):
    model = EquinoxNet()
    tx = lm.wrap(adamw(), RULES, compact=compact)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    traces = []

    @eqx.filter_jit
    def step(model, state):
        traces.append(0)
        grads = eqx.filter_grad(equinox_loss)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(3):
        model, state = step(model, state)
    assert len(traces) == 1
    check(model.as_dict(), net_alone(), rtol=2e-5)
    assert state.inner_state[0].mu.part.weight.shape == (2 if compact else 4, 4)


def test_equinox_stop_frozen():
    grads = eqx.filter_grad(lambda model: equinox_loss(lm.stop_frozen(model, RULES)))(EquinoxNet())
    wanted = jax.grad(loss_of)(make_params())
    wanted = jax.tree.map(lambda g, here: jnp.where(here, 0, g), wanted, WHERE_FROZEN)
    close(grads.as_dict(), wanted)
    assert grads.hole is None
    before, after = EquinoxNet(), eqx.tree_at(lambda m: m.head.bias, EquinoxNet(), jnp.ones(4))
    lm.assert_frozen(before, after, RULES)
    with pytest.raises(lm.FrozenError, match="'head/bias'"):
        lm.assert_frozen(before, after, [("head", None)])


@both_forms
def test_haiku(compact):
    def forward(x):
        for name in NAMES:
            x = jnp.tanh(hk.Linear(4, name=name)(x))
        return x

    net = hk.without_apply_rng(hk.transform(forward))
    assert lm.paths(net.init(jax.random.key(0), X))[0] == "head/b"
    params = {n: {"w": p["kernel"], "b": p["bias"]} for n, p in make_params().items()}

    def grads(params, i):
        return jax.grad(lambda p: jnp.mean((net.apply(p, X) - Y) ** 2))(params)

    params, _ = train(lm.wrap(adamw(), RULES, compact=compact), params, grads, 3)
    check(
        {n: {"kernel": p["w"], "bias": p["b"]} for n, p in params.items()}, net_alone(), rtol=2e-5
    )


# Plain trees ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: object
    second: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    first: object
    second: object


A, B = jnp.array([1.0, -2.0, 3.0]), jnp.array([[0.5, 1.5, 2.5]])


@both_forms
@pytest.mark.parametrize(
    ("params", "rules", "wanted"),
    [
        ([A, B], [(0, None)], [None, B]),
        ((A, (B, A)), [("1/0", None)], [A, None, A]),
        (Pair(A, Pair(B, A)), [("second/first", None)], [A, None, A]),
        (Record(A, [B]), [("second", None)], [A, None]),
        ({"a": Record(None, B), "b": A}, [("b", None)], [B, None]),
        (A, [], [A]),
        (A, [(..., None)], [None]),
        ({"a": A[0], "b": A[1]}, [("a", None)], [None, A[1]]),
        ({"a": jnp.zeros((0, 3)), "b": A}, [("a", None)], [None, A]),
        ({"a": jnp.zeros((0, 3)), "b": A}, [("b", None)], [jnp.zeros((0, 3)), None]),
        ({}, [], []),
    ],
    ids=str,
)
def test_plain_trees(params, rules, wanted, compact):
    params = jax.tree.map(jnp.copy, params)  # no array is at two places

    def grads(params, i):
        found = jax.tree.leaves(small_grads(params, i))
        spoilt = [
            jnp.full_like(g, jnp.nan) if w is None else g
            for g, w in zip(found, wanted, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), spoilt)

    after, state = train(lm.wrap(adamw(), rules, compact=compact), params, grads, 3)
    chex.assert_trees_all_equal_structs(after, params)
    small = [leaf for leaf in wanted if leaf is not None]
    trained, _ = train(adamw(), small, small_grads, 3)
    rest = iter(trained)
    for start, now, want in zip(*map(jax.tree.leaves, (params, after)), wanted, strict=True):
        if want is None:
            assert bits(now) == bits(start)
        else:
            close(now, next(rest))
    assert len(jax.tree.leaves(state)) == 1 + 2 * len(small)


@both_forms
def test_a_bare_array_in_part(compact):
    rules = [(lm.rows(..., [0, 2]), None)]
    poison = jnp.array([jnp.nan, 1.0, jnp.nan])
    after, _ = train(
        lm.wrap(adamw(), rules, compact=compact), A, lambda p, i: jnp.cos(3 * p + i) * poison, 3
    )
    wanted, _ = train(adamw(), A[1:2], small_grads, 3)
    close(after[1:2], wanted)
    lm.assert_frozen(A, after, rules)


@pytest.mark.parametrize(
    ("of_params", "of_grads", "compact"),
    [("bfloat16", "float32", False), ("float32", "bfloat16", True)],
)
def test_dtypes(of_params, of_grads, compact):
    params = jax.tree.map(lambda p: p.astype(of_params), make_params())

    def cast(grads):
        return lambda p, i: jax.tree.map(
            lambda g: g.astype(of_grads), grads(jax.tree.map(lambda a: a.astype("float32"), p), i)
        )

    def eager(tx, params, grads):
        state = tx.init(params)
        for i in range(2):
            updates, state = tx.update(grads(params, i), state, params)
            params = optax.apply_updates(params, updates)
        return params, updates, state

    found = eager(lm.wrap(adamw(), RULES, compact=compact), params, cast(full_grads))
    tx = optax.chain(adamw(), lm.scale_by_rules(SLOW))
    wanted = eager(tx, trained(params), cast(small_grads))
    for got, want in zip(found[:2], wanted[:2], strict=True):
        chex.assert_trees_all_equal_dtypes(trained(got), want)
        assert bits(trained(got)) == bits(want)
    lm.assert_frozen(params, found[0], RULES)
    of_state, of_alone = (
        {leaf.dtype for leaf in jax.tree.leaves(state)} for state in (found[2], wanted[2])
    )
    assert of_state == of_alone


@both_forms
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", ["int32", "float0"])
def test_integers(kind, frozen, compact):
    params = {"w": A, "n": jnp.array([3, -4, 5])}
    steps = jnp.array([1, 2, 3]) if kind == "int32" else np.zeros(3, jax.dtypes.float0)
    rules = [("n", None), ("w", 2)] if frozen else [("w", 2)]
    optimizer = optax.sgd(0.1) if frozen else optax.identity()
    tx = lm.wrap(optimizer, rules, compact=compact)
    updates, _ = tx.update({"w": B[0], "n": steps}, tx.init(params), params)
    close(updates["w"], B[0] * (-0.2 if frozen else 2.0))
    if kind == "float0":
        assert updates["n"].dtype == jax.dtypes.float0
    else:
        assert updates["n"].dtype == jnp.int32
        np.testing.assert_array_equal(updates["n"], [0, 0, 0] if frozen else steps)


def test_frozen_integers_keep_float0_gradients_out():
    """As `jax.grad(allow_int=True)` makes them; adam itself cannot take them."""
    params = {"w": A, "n": jnp.array([3, -4, 5]), "key": jax.random.key(0)}
    tx = lm.wrap(adamw(), [("n", None), ("key", None)])
    grads = jax.grad(lambda p: (p["w"] ** 2).sum(), allow_int=True)(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    alone = adamw()
    wanted, _ = alone.update(2 * A, alone.init(A), A)
    close(updates["w"], wanted)


# Carried over -----------------------------------------------------------------------------------

LATER = lm.Rules([(lm.neurons("part", [1]), None), ("head", 0.5)])


def muon():
    return optax.contrib.muon(1e-2, weight_decay=0.1)


# The optimizer, and whether it treats elements alone.
MIGRATED = {
    "adamw": (adamw, True),
    "MultiSteps": (lambda: optax.MultiSteps(adamw(), 2), True),
    "inject_hyperparams": (injected, True),
    "clip": (lambda: optax.chain(optax.clip(0.5), adamw()), True),
    "partition": (
        lambda: optax.partition({2: adamw(), 1: momentum()}, lambda p: jax.tree.map(jnp.ndim, p)),
        True,
    ),
    "muon": (muon, False),
}
WHOLE = lm.Rules([("trunk", None), ("head", 0.5)])
WHOLE_LATER = lm.Rules([("part", None), ("head", 0.5)])
SOON, END = 4, 7  # when the rules change, and the end


def take(places):
    return lambda p: p[..., places]


@forms(MIGRATED, ["MultiSteps", "partition", "muon"])
def test_migrate(name, compact):
    make, by_element = MIGRATED[name]
    rules, later = (RULES, LATER) if by_element else (WHOLE, WHOLE_LATER)
    kwargs = {"compact": compact}
    params, state = train(lm.wrap(make(), rules, **kwargs), make_params(), small_grads, SOON)
    between = params
    state = lm.migrate(state, params, make(), rules, later, **kwargs)
    tx = lm.wrap(make(), later, **kwargs)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, params))
    grads = lambda p, i: small_grads(p, i + SOON)  # noqa: E731
    params, state = train(tx, params, grads, END - SOON, state)
    going, fresh = migrated_alone(name)
    lm.assert_frozen(between, params, later)
    close(params["head"], going["head"])
    close(params["trunk"], fresh["trunk"], atol=1e-7 if by_element else 1e-5)
    if by_element:
        close(jax.tree.map(take([3]), params["part"]), going["part"])
        close(jax.tree.map(take([0, 2]), params["part"]), fresh["part"])


@functools.cache
def migrated_alone(name):
    """What goes on all along, and what starts late: at the count of the others, with no moments."""
    make, by_element = MIGRATED[name]
    params = make_params()
    going = {"head": params["head"]}
    late = {"trunk": params["trunk"]}
    if by_element:
        going["part"] = jax.tree.map(take([3]), params["part"])
        late["part"] = jax.tree.map(take([0, 2]), params["part"])
    optimizer = make()
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    going, _ = train(optax.chain(optimizer, lm.scale_by_rules(SLOW)), going, small_grads, END)
    # The state after as many gradients of zero.
    _, aged = train(optimizer, late, lambda p, i: jax.tree.map(jnp.zeros_like, p), SOON)
    grads = lambda p, i: small_grads(p, i + SOON)  # noqa: E731
    late, _ = train(optimizer, late, grads, END - SOON, aged)
    return going, late


@both_forms
def test_migrate_thaws_and_freezes_again(compact):
    params = make_params()
    kwargs = {"compact": compact}
    _, state = train(lm.wrap(adamw(), RULES, **kwargs), params, small_grads, 2)
    there = lm.migrate(state, params, adamw(), RULES, LATER, **kwargs)
    back = lm.migrate(there, params, adamw(), LATER, RULES, **kwargs)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)
    was, now = (optax.tree.get(s, "nu") for s in (state, back))
    assert bits(now["head"]) == bits(was["head"])
    places = [0, 1] if compact else KEPT  # of neurons 1 and 3
    was, now = (n["part"]["kernel"][:, places] for n in (was, now))
    assert bits(now[:, 1]) == bits(was[:, 1])
    assert was[:, 0].all()
    assert not now[:, 0].any()
    same = lm.migrate(state, params, adamw(), RULES, RULES, **kwargs)
    assert bits(same) == bits(state)


def test_migrate_goes_on_with_hyperparameters_and_schedules():
    ramp = optax.linear_schedule(0.0, 1.0, 8)
    rules = [("trunk", None), ("head", ramp)]
    later = [("part", None), ("head", ramp)]
    params = make_params()
    tx = lm.wrap(injected(), rules)
    params, state = train(tx, params, small_grads, 3)
    state = optax.tree.set(state, rate=jnp.float32(0.5))
    state = lm.migrate(state, params, injected(), rules, later)
    assert state.rules_state.rules_step == 3
    assert optax.tree.get(state, "rate") == 0.5
    updates, _ = lm.wrap(injected(), later).update(small_grads(params, 3), state, params)
    # The head in a run of its own.
    alone = optax.chain(injected(), lm.scale_by_rules([(..., ramp)]))
    head, state = train(alone, make_params()["head"], small_grads, 3)
    close(params["head"], head)
    state = optax.tree.set(state, rate=jnp.float32(0.5))
    wanted, _ = alone.update(small_grads(head, 3), state, head)
    close(updates["head"], wanted)


def test_migrate_element_masks():
    rng = np.random.default_rng(0)
    then, now = rng.random((2, 4, 4)) < 0.5
    rules, later = ([(lm.elements("head/kernel", m), None)] for m in (then, now))
    params = make_params()
    _, state = train(lm.wrap(adamw(), rules), params, small_grads, 2)
    new = lm.migrate(state, params, adamw(), rules, later)
    mu, old = (optax.tree.get(s, "mu")["head"]["kernel"] for s in (new, state))
    assert bits(mu) == bits(jnp.where(then | now, 0, old))
    assert (mu != 0).any()
    after, _ = train(lm.wrap(adamw(), later), params, small_grads, 2, new)
    lm.assert_frozen(params, after, later)
    with pytest.raises(lm.MaskError):
        lm.migrate(state, params, adamw(), later, rules)


@pytest.mark.parametrize("jit", [False, True])
@both_forms
@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([*FROZEN, ("head", None)], "holds something for 'head/bias', 'head/kernel'"),
        (FROZEN[1:], "holds nothing for 'trunk/bias', 'trunk/kernel'"),
    ],
)
def test_a_state_of_other_rules(rules, said, compact, jit):
    params = make_params()
    state = lm.wrap(adamw(), RULES, compact=compact).init(params)
    update = lm.wrap(adamw(), rules, compact=compact).update
    with pytest.raises(lm.RuleError, match="made for other rules") as raised:
        (jax.jit(update) if jit else update)(params, state, params)
    assert said in str(raised.value).replace(" and ", ", ")


@pytest.mark.parametrize("jit", [False, True])
def test_a_compact_state_of_other_parts(jit):
    params = make_params()
    state = lm.wrap(adamw(), RULES, compact=True).init(params)
    update = lm.wrap(adamw(), [("trunk", None), (lm.neurons("part", 0), None)], compact=True).update
    with pytest.raises(lm.RuleError, match=r"float32\[(4,)?2\] for 'part/bias'"):
        (jax.jit(update) if jit else update)(params, state, params)


# Checkpoints ------------------------------------------------------------------------------------


def saved(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
    return path


def restored(path, *target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, *target)


@both_forms
def test_orbax(compact, tmp_path):
    ramp = optax.linear_schedule(0.0, 1.0, 8)
    mask = np.random.default_rng(0).random((4, 4)) < 0.5
    rules = lm.Rules([*FROZEN, (lm.elements("head/kernel", mask), None), ("head", ramp)])
    optimizer = optax.MultiSteps(injected(), 2)
    tx = lm.wrap(optimizer, rules, compact=compact)
    step = Step(tx)
    params, state = step.run(make_params(), tx.init(make_params()), range(3))
    path = saved(tmp_path / "state", {"params": params, "state": state})
    target = jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})
    back = restored(path, target)
    chex.assert_trees_all_equal_structs(back["state"], state)
    went_on = step.run(params, state, range(3, 6))
    resumed = step.run(back["params"], back["state"], range(3, 6))
    assert bits(resumed) == bits(went_on)
    assert step.traces == 1
    # Without a target, as plain containers.
    plain = restored(path)["state"]
    assert not isinstance(plain, tuple)
    for later in (rules, lm.Rules([("part", None), ("head", ramp)])):
        carried = lm.migrate(plain, params, optimizer, rules, later, compact=compact)
        wanted = lm.migrate(state, params, optimizer, rules, later, compact=compact)
        chex.assert_trees_all_equal_structs(carried, wanted)
        assert bits(carried) == bits(wanted)
    carried = lm.migrate(plain, params, optimizer, rules, rules, compact=compact)
    assert bits(carried) == bits(state)
    assert bits(step.run(params, carried, range(3, 6))) == bits(went_on)
    assert step.traces == 1


def test_rules_saved_beside_their_state(tmp_path):
    """Both in one checkpoint; a run that knows neither goes on to the same bits."""
    rules = [["trunk", None], ["part/kernel", 0.5], ["**/bias", 0], ["**", 2]]
    tx = lm.wrap(injected(), rules)
    step = Step(tx)
    params, state = step.run(make_params(), tx.init(make_params()), range(3))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        arrays = ocp.args.StandardSave({"params": params, "state": state})
        saved = ocp.args.Composite(arrays=arrays, rules=ocp.args.JsonSave(rules))
        checkpointer.save(tmp_path / "both", saved)
        wanted = ocp.args.Composite(rules=ocp.args.JsonRestore())
        read = checkpointer.restore(tmp_path / "both", wanted).rules
        resumed = lm.wrap(injected(), read)
        target = {"params": params, "state": jax.eval_shape(resumed.init, params)}
        wanted = ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
        back = checkpointer.restore(tmp_path / "both", wanted).arrays
    assert lm.Rules(read) == lm.Rules(rules)
    went_on = step.run(params, state, range(3, 6))
    resumed = Step(resumed).run(back["params"], back["state"], range(3, 6))
    assert bits(resumed) == bits(went_on)
    other = lm.wrap(injected(), [["head", None], *read])
    with pytest.raises(
        lm.RuleError, match=r"something for 'head/kernel', which these rules freeze"
    ):
        other.update(params, back["state"], params)
