"""What an optimizer sees under `wrap`, what comes out, and what is saved."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lrmult as lm
from tests.devices import printed_on_four_devices
from tests.reference import dense, interpret
from tests.test_constants import LARGEST_CONSTANT, constants, spec
from tests.test_reference import cases
from tests.test_reference_parts import assert_same_bits, compiled_lists, scaled, updates_like

# --- what goes in and what comes out -------------------------------------------------------------


def recorder():
    """An optimizer that hands on what it gets, and keeps what it saw."""

    def update(updates, state, params=None):
        return updates, (updates, params)

    return optax.GradientTransformation(lambda params: params, update)


def is_cut(node):
    return isinstance(node, optax.MaskedNode)


@cases(60)
@given(compiled_lists(), st.booleans(), st.sampled_from([False, False, True]), st.data())
def test_the_optimizer_sees_what_trains_and_nothing_else(case, compact, jit, data):
    tree, stacked, structured, written = case
    claims, _ = interpret(structured, tree, stacked)
    multipliers = [rule[1] for rule in structured]
    leaves, treedef = jax.tree.flatten(tree)
    params, updates = (data.draw(updates_like(leaves)) for _ in range(2))
    rules = lm.optional(written)
    tx = lm.wrap(recorder(), rules, compact=compact, structure=lm.Structure(stacked=stacked))
    given_params = jax.tree.map(jnp.asarray, treedef.unflatten(params))
    given_updates = jax.tree.map(jnp.asarray, treedef.unflatten(updates))
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(given_params)
    found, after = update(given_updates, state, given_params)
    assert jax.tree.structure(found) == treedef
    for array, before, claim in zip(jax.tree.leaves(found), updates, claims, strict=True):
        assert_same_bits(array, scaled(before, claim, multipliers, 0))
    for seen, arrays in (
        (state.inner_state, params),
        (after.inner_state[0], updates),
        (after.inner_state[1], params),
    ):
        seen = jax.tree.leaves(seen, is_leaf=is_cut)
        for array, before, claim in zip(seen, arrays, claims, strict=True):
            trains = dense(claim, [m or 0 for m in multipliers]) != 0
            check_seen(array, before, trains, compact)


def check_seen(array, before, trains, compact):
    if not trains.any():
        assert is_cut(array)
        return
    trains = np.broadcast_to(trains, before.shape)
    expected = np.where(trains, before, np.zeros((), before.dtype))
    if compact and before.size:
        for axis in range(before.ndim):
            others = tuple(a for a in range(before.ndim) if a != axis)
            kept = np.asarray(trains.any(axis=others)).nonzero()[0]
            expected, trains = expected.take(kept, axis), trains.take(kept, axis)
    assert_same_bits(array, expected)


def tree_of(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        f"w{i}": jax.random.normal(key, shape)
        for i, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    }


def gradients(params, step):
    """Some gradients, others at each step."""
    return jax.tree.map(
        lambda p: jnp.cos(jnp.arange(p.size).reshape(p.shape) * 1.3 + step) + 0.1, params
    )


@functools.lru_cache
def step_of(tx, jit):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step) if jit else step


def run(tx, params, steps, gradients=gradients, jit=True, state=None):
    step = step_of(tx, jit)
    state = tx.init(params) if state is None else state
    for i in steps:
        params, state = step(params, state, gradients(params, i))
    return params, state


PARAMS = tree_of((6, 5), (5,), (5, 4), (4,))
PARTS = [
    ("w0", None),
    (lm.rows("w2", [0, 3]), None),
    (lm.along("w2", 1, 1), None),
    ("w3", 0.5),
]
OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "muon": optax.contrib.muon(0.1),
    "lars": optax.lars(0.1),
    "lamb": optax.lamb(0.1, weight_decay=0.1),
    "novograd": optax.novograd(0.1, weight_decay=0.1),
    "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1)),
}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_frozen_reaches_what_trains(name, compact):
    rules, optimizer = PARTS, OPTIMIZERS[name]
    frozen = lm.compile_rules(rules, PARAMS).frozen
    frozen = jax.tree.map(lambda f: f.dense() if isinstance(f, lm.Parts) else f, frozen)
    tx = lm.wrap(optimizer, rules, compact=compact)
    plain, _ = run(tx, PARAMS, range(5))
    lm.assert_frozen(PARAMS, plain, rules)
    for change in (lambda g: g * 1e6, lambda g: g * jnp.nan):

        def changed(params, step, change=change):
            grads = gradients(params, step)
            return jax.tree.map(lambda g, f: jnp.where(f, change(g), g), grads, frozen)

        other, _ = run(tx, PARAMS, range(5), changed)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            assert a.tobytes() == b.tobytes()
    # Nor do frozen values, which norms of parameters would count.
    large = jax.tree.map(lambda p, f: jnp.where(f, 1e6, p), PARAMS, frozen)
    other, _ = run(tx, large, range(5))
    for a, b, f in zip(*map(jax.tree.leaves, (plain, other, frozen)), strict=True):
        trains = ~np.broadcast_to(f, a.shape)
        assert np.asarray(a)[trains].tobytes() == np.asarray(b)[trains].tobytes()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_what_trains_is_as_in_a_chain(name, compact):
    chained = optax.chain(OPTIMIZERS[name], lm.scale_by_rules(PARTS))
    expected, _ = run(chained, PARAMS, range(3), jit=False)
    found, _ = run(lm.wrap(OPTIMIZERS[name], PARTS, compact=compact), PARAMS, range(3), jit=False)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compact_is_the_optimizer_on_the_sub_matrix(name):
    found, state = run(lm.wrap(OPTIMIZERS[name], PARTS, compact=True), PARAMS, range(3), jit=False)
    rows, columns = np.ix_([1, 2, 4], [0, 2, 3])
    inner = {"w1": PARAMS["w1"], "w2": PARAMS["w2"][rows, columns], "w3": PARAMS["w3"]}

    def inner_gradients(params, step):
        grads = gradients(PARAMS, step)
        return {"w1": grads["w1"], "w2": grads["w2"][rows, columns], "w3": grads["w3"]}

    half = optax.chain(OPTIMIZERS[name], lm.scale_by_rules([("w3", 0.5)]))
    expected, _ = run(half, inner, range(3), inner_gradients, jit=False)
    assert found["w2"][rows, columns].tobytes() == expected["w2"].tobytes()
    assert found["w1"].tobytes() == expected["w1"].tobytes()
    assert found["w3"].tobytes() == expected["w3"].tobytes()
    sizes = {np.shape(leaf) for leaf in jax.tree.leaves(state)}
    assert sizes <= {(), (3,), (1,), (3, 3), (4,), (5,)}


# --- what is saved -------------------------------------------------------------------------------


def layer(x, w):
    return jnp.tanh(x @ w["kernel"] + w["bias"])


STACK = {
    f"layer_{i}": {"kernel": jnp.eye(64) + 0.01 * i, "bias": jnp.zeros(64)} for i in range(10)
} | {"head": {"kernel": jnp.ones((64, 16)), "bias": jnp.zeros(16)}}
INPUTS = jnp.ones((256, 64))
CASES = {
    "prefix": [("layer_[:9]", None)],
    "biases": [("**/bias", 1), (..., None)],
    "last": [("head", 1), (..., None)],
}


def loss(params):
    x = INPUTS
    for i in range(10):
        x = layer(x, params[f"layer_{i}"])
    return (layer(x, params["head"]) ** 2).mean()


def split(rules):
    """The arrays that train and the rest, and the way back."""
    trains = jax.tree.leaves(lm.compile_rules(rules, STACK).trainable)
    leaves, treedef = jax.tree.flatten(STACK)

    def merge(trained, frozen):
        trained, frozen = iter(trained), iter(frozen)
        return treedef.unflatten([next(trained) if t else next(frozen) for t in trains])

    parts = [
        [x for x, t in zip(leaves, trains, strict=True) if t],
        [x for x, t in zip(leaves, trains, strict=True) if not t],
    ]
    return *parts, merge


def compiled(step, *arguments):
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    return program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_work_memory_and_state_are_those_of_what_trains(name, scan):
    rules = CASES[name]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))
    trained, frozen, merge = split(rules)

    def by_hand(trained, state, frozen):
        grads = jax.grad(lambda trained: loss(merge(trained, frozen)))(trained)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    tx = lm.wrap(optimizer, rules)

    def wrapped(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def scanned(step):
        def steps(params, state, *rest):
            body = lambda carry, _: (step(*carry, *rest), None)  # noqa: E731
            return jax.lax.scan(body, (params, state), length=3)[0]

        return steps if scan else step

    states = optimizer.init(trained), tx.init(STACK)
    assert bytes_of(states[0]) == bytes_of(states[1])
    hand = compiled(scanned(by_hand), trained, states[0], frozen)
    ours = compiled(scanned(wrapped), STACK, states[1])
    assert ours[0] == pytest.approx(hand[0], rel=0.01)
    assert ours[1] <= 1.05 * hand[1]
    zeros = optax.chain(optimizer, lm.scale_by_rules(rules))

    def full(params, state):
        updates, state = zeros.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    assert compiled(scanned(full), STACK, zeros.init(STACK))[0] > 1.3 * ours[0]


@pytest.mark.parametrize("name", CASES)
def test_stop_frozen_saves_the_backward_pass_of_gradients_that_leave_the_jit(name):
    trained, frozen, merge = split(CASES[name])

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    by_hand = flops(jax.grad(lambda trained, frozen: loss(merge(trained, frozen))), trained, frozen)
    stopped = jax.grad(lambda params: loss(lm.stop_frozen(params, CASES[name])))
    assert flops(stopped, STACK) == pytest.approx(by_hand, rel=0.01)
    assert flops(jax.grad(loss), STACK) > 1.3 * by_hand


@pytest.mark.parametrize("rows", ["last", "scattered", "strided"])
def test_new_rows_of_an_embedding(rows):
    chosen = {
        "last": slice(-64, None),
        "scattered": np.random.default_rng(0).permutation(50_000)[:64].tolist(),
        "strided": slice(0, 50_000, 800),
    }[rows]
    params = {"embed": spec(50_000, 512)}
    tx = lm.wrap(optax.adamw(0.1), [(lm.rows("embed", chosen), 1), (..., None)], compact=True)
    state = jax.eval_shape(tx.init, params)
    full = jax.eval_shape(optax.adam(0.1).init, params)
    assert bytes_of(state) <= 0.005 * bytes_of(full)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    assert max(constants(lowered)) <= LARGEST_CONSTANT
    # The array is overwritten where it stands, also under weight decay, which reads some rows.
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 0.1 * bytes_of(params)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_long_axis_is_cut_and_put_back(axis):
    """Longer than what is a constant of a program as it stands."""
    size = 70_001
    chosen = np.sort(np.random.default_rng(0).permutation(size)[:40_000])
    shape = (size, 2) if axis == 0 else (2, size)
    params = {"w": jnp.arange(2 * size, dtype=jnp.float32).reshape(shape)}
    tx = lm.wrap(optax.sgd(1.0), [(lm.along("w", axis, chosen), 1), (..., None)], compact=True)
    step = jax.jit(lambda params: tx.update(params, tx.init(params), params)[0])
    assert max(constants(step.lower(params))) <= LARGEST_CONSTANT
    expected = np.full(shape, -0.0, np.float32)
    places = (chosen,) if axis == 0 else (slice(None), chosen)
    expected[places] = -np.asarray(params["w"])[places]
    assert step(params)["w"].tobytes() == expected.tobytes()
    assert tx.update(params, tx.init(params), params)[0]["w"].tobytes() == expected.tobytes()


# --- extra arguments -----------------------------------------------------------------------------


LBFGS_RULES = [("w0", None), (lm.rows("w2", [0, 3]), None)]
TARGET = jax.tree.map(lambda p: p[::-1] + 1.0, PARAMS)


def value_of(params, weight):
    cubes = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 4 + (p - t) ** 2), params, TARGET)
    return weight * sum(jax.tree.leaves(cubes))


def minimize(tx, params, value_fn):
    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(value_fn)(params, 2.0)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn, weight=2.0
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    return params


@functools.cache
def minimized_by_hand():
    rows = np.array([1, 2, 4])

    def with_frozen(params, weight):
        w2 = PARAMS["w2"].at[rows].set(params["w2"])
        return value_of(PARAMS | params | {"w2": w2}, weight)

    inside = {name: PARAMS[name] for name in ("w1", "w3")} | {"w2": PARAMS["w2"][rows]}
    found = minimize(optax.lbfgs(), inside, with_frozen)
    return PARAMS | found | {"w2": PARAMS["w2"].at[rows].set(found["w2"])}


@pytest.mark.parametrize("compact", [False, True])
def test_lbfgs_with_line_search_is_that_of_what_trains(compact):
    found = minimize(lm.wrap(optax.lbfgs(), LBFGS_RULES, compact=compact), PARAMS, value_of)
    lm.assert_frozen(PARAMS, found, LBFGS_RULES)
    for name, array in minimized_by_hand().items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)
    assert value_of(found, 1.0) < 0.75 * value_of(PARAMS, 1.0)


def test_what_is_like_the_updates_is_narrowed_and_the_rest_is_handed_on():
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        seen["called"] = extra_args["value_fn"](params, scale=extra_args["scale"])
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = lm.wrap(inner, [("w0", None), (lm.rows("w2", 0), None)], compact=True)
    other = {"w0": jnp.ones(2)}

    def value_fn(params, scale):
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, PARAMS)
        for name in PARAMS:  # as it was given, though the optimizer saw it narrowed
            assert scale[name].tobytes() == PARAMS[name].tobytes()
        return params["w2"]

    tx.update(
        PARAMS,
        tx.init(PARAMS),
        PARAMS,
        grad=PARAMS,
        value=1.5,
        other=other,
        value_fn=value_fn,
        scale=PARAMS,
    )
    assert is_cut(seen["grad"]["w0"])
    assert seen["grad"]["w2"].tobytes() == PARAMS["w2"][1:].tobytes()
    assert seen["value"] == 1.5
    assert seen["other"] is other
    assert is_cut(seen["scale"]["w0"])
    assert seen["called"].tobytes() == PARAMS["w2"].tobytes()
    assert seen["value_fn"].__wrapped__ is value_fn


def test_gradients_for_each_example_have_an_axis_in_front():
    rules = [("w0", None), (lm.rows("w2", [0, 3]), None)]
    aggregate = optax.contrib.differentially_private_aggregate(1.0, 0.0, key=jax.random.key(0))
    dpsgd = optax.chain(aggregate, optax.sgd(0.1))
    grads = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), PARAMS)
    other = grads | {
        "w0": grads["w0"] * jnp.nan,
        "w2": grads["w2"].at[:, jnp.array([0, 3])].set(jnp.inf),
    }
    inside = {"w1": grads["w1"], "w2": grads["w2"][:, jnp.array([1, 2, 4])], "w3": grads["w3"]}
    expected, _ = dpsgd.update(inside, dpsgd.init(inside))
    for compact in (False, True):
        tx = lm.wrap(dpsgd, rules, compact=compact)
        updates, _ = tx.update(other, tx.init(PARAMS), PARAMS)
        after = optax.apply_updates(PARAMS, updates)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, PARAMS)
        lm.assert_frozen(PARAMS, after, rules)
        updates["w2"] = updates["w2"][jnp.array([1, 2, 4])]
        for name, update in expected.items():
            np.testing.assert_allclose(updates[name], update, rtol=1e-6)


def test_gradients_that_a_function_returns_are_narrowed():
    def loss(params):
        return sum(jnp.sum(p**2) for p in params.values())

    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True)
    rules = [("w0", None), (lm.rows("w2", 0), None)]
    gradient = jax.grad(loss)
    for compact in (False, True):
        tx = lm.wrap(sam, rules, compact=compact)
        updates, _ = tx.update(
            gradient(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=lambda p, _: gradient(p)
        )
        inside = {name: PARAMS[name] for name in ("w1", "w3")} | {"w2": PARAMS["w2"][1:]}
        expected, _ = sam.update(
            gradient(inside), sam.init(inside), inside, grad_fn=lambda p, _: gradient(p)
        )
        updates["w2"] = updates["w2"][1:]
        for name, update in expected.items():
            np.testing.assert_allclose(updates[name], update, rtol=1e-6)


@dataclasses.dataclass
class Task:
    """A function with data, as a pytree."""

    scale: jax.Array

    def __call__(self, params, **kwargs):
        return self.scale * sum(jnp.sum(p**2) for p in params.values()) + 0 * kwargs.get("key", 0)


jax.tree_util.register_dataclass(Task, ["scale"], [])


@pytest.mark.parametrize("compact", [False, True])
def test_functions_of_every_kind_get_full_parameters(compact):
    def update(updates, state, params=None, *, value_fn, key, task):
        assert isinstance(task, Task)  # callable, but data
        return updates, (value_fn(params, key=key + 7), jax.grad(value_fn)(params, key=key))

    def loss(params, key):
        assert key in (5, 12)
        return Task(jnp.float32(2))(params, key=key)

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = lm.wrap(inner, [("w0", None), (lm.rows("w2", 0), None)], compact=compact)
    for function in (loss, Task(jnp.float32(2)), jax.tree_util.Partial(loss)):
        _, state = tx.update(
            PARAMS, tx.init(PARAMS), PARAMS, value_fn=function, key=5, task=Task(jnp.float32(1))
        )
        value, grads = state.inner_state
        np.testing.assert_allclose(value, 2 * sum(jnp.sum(p**2) for p in PARAMS.values()))
        assert is_cut(grads["w0"])
        assert grads["w2"].shape == (4 if compact else 5, 4)
        np.testing.assert_allclose(grads["w1"], 4 * PARAMS["w1"])


def test_several_trees_of_one_transformation_are_checked_once_each():
    calls = []

    def init(params):
        calls.append(params)
        return jax.tree.map(jnp.zeros_like, params)

    inner = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    tx = lm.wrap(inner, [("a", None)])
    trees = [{"a": jnp.ones(2), "b": jnp.ones(n)} for n in (2, 3)]
    states = [tx.init(tree) for tree in trees]
    for _ in range(3):
        for tree, state in zip(trees, states, strict=True):
            tx.update(tree, state, tree)
        calls.append(None)
    assert calls[-2:] == [None, None]


def test_updates_of_another_structure_are_refused():
    tx = lm.wrap(optax.lookahead(optax.sgd(0.1), 3, 0.5), [("**/w0", None)])
    params = optax.LookaheadParams(PARAMS, PARAMS)
    with pytest.raises(lm.RuleError, match=r"not structured like its gradients, .* put lrmult"):
        tx.update(PARAMS, tx.init(params), params)


# --- several devices -----------------------------------------------------------------------------


def test_sharded_arrays_need_no_communication_and_stay_sharded():
    code = """
import re
import jax, jax.numpy as jnp, optax, lrmult as lm
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

specs = {"a": P("d", None), "b": P(None, "d"), "c": P("d", None)}
rows = [(lm.rows("b", [1, 2, 7]), None), ("c", None)]
adamw = optax.adamw(0.1)

def step_of(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step

for kind in AxisType.Auto, AxisType.Explicit:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        shapes = {"a": (8, 16), "b": (16, 8), "c": (8, 8)}
        params = {
            name: jax.device_put(jnp.ones(shapes[name]), NamedSharding(mesh, spec))
            for name, spec in specs.items()
        }
        for compact in False, True:
            rules = [*rows, (lm.rows("a", [0, 3]), None)][: 3 - compact]
            tx = lm.wrap(adamw, rules, compact=compact)
            compiled = jax.jit(step_of(tx)).lower(params, tx.init(params), params).compile()
            text = compiled.as_text()
            assert not re.search("all-gather|all-reduce|collective-permute|all-to-all", text)
            after, state = compiled(params, tx.init(params), params)
            lm.assert_frozen(params, after, rules)
            assert (after["b"][0] != params["b"][0]).all()
            for name, spec in specs.items():
                assert after[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
            _, state = step_of(tx)(params, tx.init(params), params)
            state = lm.migrate(state, after, adamw, rules, [("c", None)], compact=compact)
            tx = lm.wrap(adamw, [("c", None)], compact=compact)
            step_of(tx)(params, state, params)
        for index in slice(0, 4), [0, 3, 4, 6], [1, 5, 6]:  # places that are sharded
            rules = [(lm.rows("a", index), 1), (..., None)]
            tx = lm.wrap(adamw, rules, compact=True)
            for run in step_of(tx), jax.jit(step_of(tx)):
                after, state = run(params, tx.init(params), params)
                lm.assert_frozen(params, after, rules)
                assert (after["a"] != params["a"]).any(axis=1).sum() == jnp.arange(8)[
                    jnp.array(index) if isinstance(index, list) else index
                ].size
        print(kind.name)
"""
    assert printed_on_four_devices(code).split() == ["Auto", "Explicit"]


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
def test_a_state_for_other_arrays_names_them(jit):
    made = lm.wrap(optax.adam(0.1), [("w0", None), ("w1", None)]).init(PARAMS)
    tx = lm.wrap(optax.adam(0.1), [("w1", None), ("w2", None)])
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(
        lm.RuleError,
        match=r"made for other rules, or another optimizer: it holds nothing for 'w0', which these "
        r"rules train; it holds something for 'w2', which these rules freeze; .*lrmult\.migrate\(",
    ):
        update(PARAMS, made, PARAMS)


@pytest.mark.parametrize("jit", [False, True])
def test_a_compact_state_for_other_parts_names_them(jit):
    # One row would broadcast against two without a word.
    made = lm.wrap(optax.adam(0.1), [(lm.rows("w0", 0), 1), (..., None)], compact=True)
    tx = lm.wrap(optax.adam(0.1), [(lm.rows("w0", [0, 1]), 1), (..., None)], compact=True)
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(lm.RuleError, match=r"float32\[1,5\] for 'w0', .* train .*float32\[2,5\]"):
        update(PARAMS, made.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("optimizer", "seen"),
    [
        (optax.adam, "the function adam is no optimizer; write lrmult.wrap(optimizer, rules)"),
        ([("w0", None)], "is no optimizer"),
        (None, "None is no optimizer"),
    ],
)
def test_something_else_for_an_optimizer(optimizer, seen):
    with pytest.raises(lm.RuleError) as caught:
        lm.wrap(optimizer, [])
    assert seen in str(caught.value)


def test_the_state_of_something_else():
    tx = lm.wrap(optax.adam(0.1), [])
    with pytest.raises(lm.RuleError, match=r"wrap keeps a WrapState"):
        tx.update(PARAMS, optax.adam(0.1).init(PARAMS), PARAMS)


def test_rules_are_checked_at_once_and_by_init_and_update():
    with pytest.raises(lm.MultiplierError):
        lm.wrap(optax.adam(0.1), [("w0", "fast")])
    tx = lm.wrap(optax.adam(0.1), [("v0", 1)])
    with pytest.raises(lm.UnmatchedRuleError):
        tx.init(PARAMS)
    lax = lm.wrap(optax.adam(0.1), [("v0", 1)], strict=False)
    with pytest.warns(UserWarning, match="no path matches 'v0'"):
        state = lax.init(PARAMS)
    with pytest.raises(lm.UnmatchedRuleError):
        tx.update(PARAMS, state, PARAMS)


# --- run time ------------------------------------------------------------------------------------


def test_schedules_and_masks_share_the_state_of_the_rules():
    mask = np.zeros((5, 4), bool)
    mask[0, 0] = mask[1, 1] = True
    rules = [(lm.elements("w2", mask), None), ("w3", optax.linear_schedule(0.0, 1.0, 4))]
    tx = lm.wrap(optax.sgd(1.0), rules)
    state = tx.init(PARAMS)
    assert state.rules_state.rules_step == 0
    assert [bits.nbytes for bits in state.rules_state.rules_masks] == [5]
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    update = jax.jit(tx.update)
    for step in range(3):
        updates, state = update(ones, state, PARAMS)
        assert updates["w3"].tolist() == [-step / 4] * 4
        assert updates["w2"].tobytes() == np.where(mask, -0.0, -1.0).astype(np.float32).tobytes()
    assert update._cache_size() == 1


def test_everything_frozen():
    tx = lm.wrap(optax.adamw(0.1), [(..., None)])
    state = tx.init(PARAMS)
    assert bytes_of(state) == 4
    updates, state = tx.update(gradients(PARAMS, 0), state, PARAMS)
    for update in jax.tree.leaves(updates):
        assert (np.signbit(update) & (update == 0)).all()


def test_by_the_gradient_of_a_run_time_multiplier():
    def after(rate):
        tx = lm.wrap(optax.sgd(0.1), [("w0", None), ("w1", rate)])
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        return optax.apply_updates(PARAMS, updates)["w1"].sum()

    assert jax.grad(after)(jnp.float32(2.0)) == pytest.approx(-0.1 * float(PARAMS["w1"].sum()))


def test_a_predicate_of_dtypes_sees_those_of_the_parameters():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    rules = [(lambda path, leaf: leaf.dtype == jnp.bfloat16, None)]
    tx = lm.wrap(optax.adam(0.1), rules)
    grads = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    lm.assert_frozen(params, optax.apply_updates(params, updates), rules)
    assert (updates["b"] != 0).all()
