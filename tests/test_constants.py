"""What parts and schedules may cost whatever the machine: constants, state, calls, traces."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrmult as lm
from tests.programs import constants
from tests.versions import enable_x64

LARGEST_CONSTANT = 2**16
MATRIX = (4096, 16384)


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def lower(rules, params, **kwargs):
    """The step of an optimizer with rules, and the state that the rules keep."""
    tx = optax.chain(optax.sgd(0.1), lm.scale_by_rules(rules, **kwargs))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step).lower(params, state, params), state[-1]


def scattered(shape):
    """A mask that is no outer product of vectors."""
    mask = np.zeros(shape, bool)
    mask[::3, ::5] = True
    mask[1, 1] = True
    return mask


def random_places(size, count):
    return np.random.default_rng(0).permutation(size)[:count].tolist()


ROWS, COLUMNS = random_places(4096, 400), random_places(16384, 1600)
FACTORED = {
    "columns": [(lm.along("w", 1, COLUMNS), None)],
    "columns scaled": [(lm.along("w", 1, COLUMNS), 0.1)],
    "columns of many kinds": [(lm.along("w", 1, slice(i, None, 7)), 1 + i) for i in range(7)],
    "rows": [(lm.rows("w", ROWS), None)],
    "rows by a vector": [(lm.rows("w", np.arange(4096) % 3 == 0), 0.5)],
    "rows and columns": [(lm.rows("w", ROWS), None), (lm.along("w", 1, COLUMNS), 0.1)],
    "rows in columns": [(lm.rows(lm.along("w", 1, COLUMNS), ROWS), None), ("w", 3)],
    "neurons": [(lm.neurons("w", COLUMNS, axis=1), None)],
    "a schedule in columns": [(lm.along("w", 1, COLUMNS), lambda step: 1 / (1 + step))],
    "a schedule beside rows": [(lm.rows("w", ROWS), None), ("w", lambda step: 1 / (1 + step))],
}


@pytest.mark.parametrize("name", FACTORED)
def test_parts_along_axes_are_small_constants(name):
    rules = FACTORED[name]
    lowered, state = lower(rules, {"w": spec(*MATRIX)})
    assert max(constants(lowered), default=0) <= LARGEST_CONSTANT
    if any(callable(multiplier) for _, multiplier in rules):
        assert state.rules_masks == ()
        assert state.rules_step == jax.ShapeDtypeStruct((), jnp.int32)
    else:
        assert state == optax.EmptyState()


EMBEDDING = {
    "new tokens": [(lm.rows("e", slice(-10, None)), 1), (..., None)],
    "many tokens": [(lm.rows("e", random_places(100_000, 3000)), None)],
    "tokens of two kinds": [(lm.rows("e", ROWS), None), (lm.rows("e", slice(5000, None)), 0.1)],
    "tokens and columns": [(lm.along(lm.rows("e", ROWS), 1, slice(0, 512, 3)), None)],
    "tokens of many kinds": [(lm.rows("e", slice(i, None, 20)), 1 + i) for i in range(20)],
    "neurons": [(lm.neurons("e", random_places(100_000, 3000), axis=0), 0.5)],
    "a schedule": [(lm.rows("e", ROWS), lambda step: 0.1 * step), ("e", None)],
}


@pytest.mark.parametrize("name", EMBEDDING)
def test_rows_of_an_embedding_are_small_constants(name):
    lowered, _ = lower(EMBEDDING[name], {"e": spec(100_000, 512)})
    assert max(constants(lowered), default=0) <= LARGEST_CONSTANT


@pytest.mark.parametrize("name", EMBEDDING)
def test_a_long_axis_is_ruled_eagerly_too(name):
    rules = [(target, m(3) if callable(m) else m) for target, m in EMBEDDING[name]]
    grads = {"e": jnp.ones((100_000, 2))}
    if name == "tokens and columns":
        rules = [(lm.along(lm.rows("e", ROWS), 1, 1), None)]
    updates, _ = lm.scale_by_rules(rules).update(grads, optax.EmptyState())
    wanted = lm.compile_rules(rules, grads).multipliers["e"]
    wanted = wanted.dense() if isinstance(wanted, lm.Parts) else wanted
    np.testing.assert_allclose(updates["e"], np.broadcast_to(wanted, (100_000, 2)), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_wide_numbers_are_small_constants(dtype):
    with enable_x64(True):
        params = {"w": jax.ShapeDtypeStruct(MATRIX, jnp.dtype(dtype))}
        for kinds in (7, 20):
            rules = [(lm.along("w", 1, slice(i, None, kinds)), 1 + i) for i in range(kinds)]
            lowered, _ = lower(rules, params)
            assert max(constants(lowered)) <= LARGEST_CONSTANT


def test_stacked_layers_and_neurons_are_small_constants():
    params = {
        "layers": {"kernel": spec(48, 1024, 16384), "bias": spec(48, 16384)},
        "fc": {"kernel": spec(4096, 16384), "bias": spec(16384)},
    }
    rules = [
        ("layers[2:4]", None),
        (lm.neurons("layers[-1]", COLUMNS), 0.1),
        (lm.neurons("fc", COLUMNS), None),
        ("fc", 0.5),
    ]
    lowered, state = lower(rules, params, structure=lm.Structure(stacked={"layers": 0}))
    assert max(constants(lowered)) <= LARGEST_CONSTANT
    assert state == optax.EmptyState()


def test_an_arbitrary_mask_is_one_bit_per_element_of_state_and_no_constant():
    params = {"w": spec(*MATRIX)}
    rules = [(lm.elements("w", scattered(MATRIX)), None), (lm.rows("w", ROWS), 0.1)]
    lowered, state = lower(rules, params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == (
        ((), jnp.int32),
        (((4096, 2048), jnp.uint8),),
    )
    assert max(constants(lowered)) <= LARGEST_CONSTANT
    kept = lm.scale_by_rules(rules).init(params)
    assert [leaf.nbytes for leaf in jax.tree.leaves(kept)] == [4, 4096 * 2048]


def test_a_factored_mask_is_no_state():
    mask = np.zeros(MATRIX, bool)
    mask[np.ix_(ROWS, COLUMNS)] = True
    lowered, state = lower([(lm.elements("w", mask), None)], {"w": spec(*MATRIX)})
    assert state == optax.EmptyState()
    assert max(constants(lowered)) <= LARGEST_CONSTANT


def test_one_mask_is_kept_once():
    mask = scattered((6, 20))
    rules = [(lm.elements(name, mask), 0.5) for name in "ab"]
    _, state = lower(rules, {"a": spec(6, 20), "b": spec(6, 20), "c": spec(6, 20)})
    assert [bits.shape for bits in state.rules_masks] == [(6, 3)]


RATES = [None if i % 7 == 0 else (i + 1) / 64 for i in range(70)]
LONG = 1 << 17


@pytest.mark.parametrize("shape", [(LONG,), (LONG, 3), (3, LONG)])
@pytest.mark.parametrize("in_runs", [True, False])
@pytest.mark.parametrize("kept", [9, 70])
def test_many_rates_along_a_long_axis_are_no_large_constant(shape, in_runs, kept):
    axis = int(np.argmax(shape))
    picked = np.random.default_rng(0).integers(0, kept, LONG)
    if in_runs:
        picked = np.sort(picked)
    rules = [(lm.along("a", axis, picked == i), rate) for i, rate in enumerate(RATES[:kept])]
    lowered, _ = lower(rules, {"a": spec(*shape), "b": spec(), "c": spec()})
    assert max(constants(lowered)) <= LONG // 8
    assert sum(constants(lowered)) <= (LONG if in_runs else 2 * LONG)
    wanted = np.array([-0.0 if rate is None else rate for rate in RATES], np.float32)[picked]
    wanted = np.broadcast_to(wanted.reshape([-1 if n == LONG else 1 for n in shape]), shape)
    for dtype in (np.float32, jnp.bfloat16):
        grads = {"a": jnp.ones(shape, dtype)}
        tx = lm.scale_by_rules(rules)
        updates, _ = tx.update(grads, tx.init(grads))
        assert np.asarray(updates["a"]).tobytes() == wanted.astype(dtype).tobytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bool_, jnp.bfloat16, jnp.complex64])
def test_a_large_constant_would_be_seen(dtype):
    large = np.random.default_rng(0).integers(0, 2, (3, 40_000)).astype(dtype)
    lowered = jax.jit(lambda x: jnp.where(large, x, jnp.full(large.shape, 7.0))).lower(spec())
    assert max(constants(lowered)) == large.nbytes
    assert constants(jax.jit(lambda: jnp.zeros((3, 40_000))).lower()) == [0]


def counted(calls, name, value):
    def schedule(step):
        calls.append(name)
        return value / (1 + step)

    return schedule


def many_arrays():
    return {name: [jnp.ones((4, 8)) for _ in range(6)] for name in "abcd"}


def many_parts(first, second):
    """Rules that hold two multipliers, each in several places."""
    return [
        (lm.rows("a", 0), first),
        (lm.elements("{a,b}", scattered((4, 8))), second),
        (lm.along("c", 1, slice(3)), None),
        ("{a,c}", first),
        ("d[2:4]", second),
    ]


def test_schedules_are_called_once_per_update():
    calls = []
    tx = lm.scale_by_rules(many_parts(counted(calls, "a", 1.0), counted(calls, "b", 2.0)))
    grads = many_arrays()
    state = tx.init(grads)
    assert calls == []
    for update in range(3):
        assert state.rules_step == update
        _, state = tx.update(grads, state)
        assert sorted(calls) == ["a", "b"]
        calls.clear()
    step = jax.jit(tx.update)
    for _ in range(3):
        _, state = step(grads, state)
    assert sorted(calls) == ["a", "b"]  # once, while it was traced
    assert state.rules_step == 6


def test_nothing_is_traced_again_after_the_first_step():
    traces = []
    rules = many_parts(lambda step: 1 / (1 + step), 0.5)
    tx = optax.chain(optax.adamw(1e-3), lm.scale_by_rules(rules))

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = many_arrays()
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == step._cache_size() == 1


def test_a_run_time_value_is_not_traced_again():
    traces = []

    @jax.jit
    def update(grads, state, value):
        traces.append(1)
        rules = many_parts(value, lambda step: 1 + step)
        return lm.scale_by_rules(rules).update(grads, state)

    grads = many_arrays()
    state = lm.scale_by_rules(many_parts(1.0, lambda step: 1 + step)).init(grads)
    for value in (0.5, 0.25, 0.0):
        updates, state = update(grads, state, jnp.float32(value))
        np.testing.assert_array_equal(updates["c"][0][0, 3:], [value] * 5)
    assert len(traces) == update._cache_size() == 1


DTYPES = ["bfloat16", "float16", "float32", "complex64"]
DTYPES += [name for name in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn") if hasattr(jnp, name)]
KINDS = {
    "numbers": lambda: (0.3, None),
    "schedules": lambda: (lambda step: 1 / (1 + step), lambda step: 0.3),
    "integers": lambda: (lambda step: step, jnp.int32(2)),
    "run-time values": lambda: (jnp.float32(0.3), jnp.bfloat16(0.3)),
    "wide values": lambda: (jnp.asarray(0.3, float), lambda step: jnp.asarray(0.3, float) * step),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_dtype_changes(kind, x64, jit):
    with enable_x64(x64):
        dtypes = DTYPES + ["float64", "complex128"] * x64
        grads = {name: [jnp.ones((4, 8), dtype) for dtype in dtypes] for name in "abcd"}
        tx = lm.scale_by_rules(many_parts(*KINDS[kind]()))
        updates, _ = (jax.jit(tx.update) if jit else tx.update)(grads, tx.init(grads))
        for leaf, grad in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            assert leaf.dtype == grad.dtype
            assert not leaf.weak_type
