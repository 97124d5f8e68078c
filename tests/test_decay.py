"""Weight decay by rules of its own: by numbers, in every order, and in every place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import assume, given
from hypothesis import strategies as st

import lrmult as lm
from tests.reference import dense, interpret
from tests.test_constants import LARGEST_CONSTANT, constants, spec
from tests.test_reference import cases
from tests.test_reference_parts import compiled_lists

PARAMS = {
    "head": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([0.25, -4.0])},
    "norm": {"scale": jnp.array([1.5, 2.5, -0.5])},
    "trunk": jnp.array([2.0, -8.0]),
}
GRADS = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size) * 1.3 + 1.0).reshape(p.shape), PARAMS)
EYE = np.eye(2, dtype=bool)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def run(tx, steps=3, params=PARAMS, grads=GRADS, jit=False, state=None):
    """The updates of every step, and the last state; the parameters move with them."""
    update = jax.jit(tx.update) if jit else tx.update
    state, seen = tx.init(params) if state is None else state, []
    for i in range(steps):
        updates, state = update(jax.tree.map(lambda g: g * (1 + i), grads), state, params)  # noqa: B023
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))
        seen.append(updates)
    return seen, state


SCHEDULE = optax.linear_schedule(0.5, 0.1, 2)
RATES = {
    "number": 0.25,
    "zero": 0.0,
    "negative": -0.5,
    "schedule": SCHEDULE,
    "number of NumPy": np.float32(0.3),
    "array": jnp.float32(0.3),
}
EVERY_RATE = [(name, False) for name in RATES] + [("number", True), ("schedule", True)]


# ---- what optax does ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "jit"), EVERY_RATE)
def test_without_rules_it_is_that_of_optax(name, jit):
    rate = RATES[name]
    ours, _ = run(lm.scale_decay(rate, []), jit=jit)
    theirs, _ = run(optax.add_decayed_weights(rate), jit=jit)
    assert bits(ours) == bits(theirs)
    assert bits(ours) == bits(run(lm.scale_decay(rate, [("head", 1), (..., 1)]), jit=jit)[0])


@pytest.mark.parametrize(("name", "jit"), [("negative", False), ("array", False), *EVERY_RATE[-2:]])
def test_frozen_is_masked(name, jit):
    rate = RATES[name]
    ours, _ = run(lm.scale_decay(rate, [("**/{bias,scale}", None)]), jit=jit)
    mask = jax.tree.map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), PARAMS)
    theirs, _ = run(optax.add_decayed_weights(rate, mask), jit=jit)
    assert bits(ours) == bits(theirs)
    grads = [GRADS["norm"]["scale"] * (1 + i) for i in range(3)]
    assert bits([step["norm"] for step in ours]) == bits(grads)


@pytest.mark.parametrize("rate", [0.25, SCHEDULE], ids=["number", "schedule"])
def test_a_multiplier_is_another_rate(rate):
    """0.5, 2 and -1 scale without rounding."""
    rules = [("head/kernel", 0.5), ("head", 2), ("norm", -1), (..., None)]
    ours, _ = run(lm.scale_decay(rate, rules))
    for above, name, factor in (
        ("head", "kernel", 0.5),
        ("head", "bias", 2),
        ("norm", "scale", -1),
    ):
        other = (lambda step, f=factor: f * rate(step)) if callable(rate) else factor * rate
        theirs, _ = run(optax.add_decayed_weights(other))
        for a, b in zip(ours, theirs, strict=True):
            assert bits(a[above][name]) == bits(b[above][name])


@pytest.mark.parametrize("rate", [0.1, SCHEDULE], ids=["number", "schedule"])
def test_adamw_is_the_second_order(rate):
    rates = [("head", 0.1), ("trunk", None)]
    ours = optax.chain(
        optax.scale_by_adam(),
        lm.scale_decay(rate, [("**/bias", None)]),
        optax.scale_by_learning_rate(0.1),
        lm.scale_by_rules(rates),
    )
    mask = {"head": {"kernel": True, "bias": False}, "norm": True, "trunk": True}
    adamw = optax.adamw(0.1, weight_decay=rate, mask=mask)
    theirs = optax.chain(adamw, lm.scale_by_rules(rates))
    assert bits(run(ours)[0]) == bits(run(theirs)[0])


# ---- by hand, element by element ----------------------------------------------------------------

numbers = st.sampled_from([0.5, -1.25, 3.0, 0.1, -7.0])
odd = st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-3, -5.0])


def array_like(draw, leaf, values):
    drawn = draw(st.lists(values, min_size=7, max_size=7))
    return np.resize(np.float32(drawn), leaf.shape) if leaf.size else np.float32(leaf)


@cases(15)
@given(compiled_lists(), st.data())
def test_every_element_decays_by_its_multiplier(case, data):
    tree, stacked, structured, written = case
    assume(tree is not None)  # as parameters, that is none at all
    claims, _ = interpret(structured, tree, stacked)
    multipliers = [rule[1] or 0.0 for rule in structured]
    leaves, treedef = jax.tree.flatten(tree)
    params = [array_like(data.draw, leaf, numbers) for leaf in leaves]
    updates = [array_like(data.draw, leaf, odd) for leaf in leaves]
    structure = lm.Structure(stacked=stacked)
    tx = lm.scale_decay(0.3, lm.optional(written), structure=structure)
    given_params, given_updates = (
        treedef.unflatten(map(jnp.asarray, arrays)) for arrays in (params, updates)
    )
    found, _ = tx.update(given_updates, tx.init(given_params), given_params)
    assert jax.tree.structure(found) == treedef
    for got, update, param, claim in zip(
        jax.tree.leaves(found), updates, params, claims, strict=True
    ):
        factor = np.broadcast_to(np.float32(dense(claim, multipliers)), param.shape)
        with np.errstate(invalid="ignore"):
            decayed = update + np.float32(0.3) * (param * factor)
        wanted = np.where(factor == 0, update, decayed)
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == np.float32
        frozen = np.broadcast_to(factor == 0, param.shape)
        assert np.asarray(got)[frozen].tobytes() == update[frozen].tobytes()


# Parts of the kernel that do not decay, and which.
PARTS = {
    "rows": (lm.rows("head/kernel", 0), [[True, True], [False, False]]),
    "along": (lm.along("head/kernel", 1, -1), [[False, True], [False, True]]),
    "neurons": (lm.neurons("head", [1]), [[False, True], [False, True]]),
    "elements": (lm.elements("head/kernel", EYE), [[True, False], [False, True]]),
    "all of it": ("head", [[True, True], [True, True]]),
}
SPOILED = {
    "head": {
        "kernel": jnp.array([[-0.0, jnp.nan], [jnp.inf, -0.0]]),
        "bias": jnp.array([1.0, -0.0]),
    },
    "norm": {"scale": jnp.array([-0.0, 0.0, 1.0])},
    "trunk": jnp.array([-0.0, jnp.nan]),
}


@pytest.mark.parametrize(
    ("rate", "jit"), [(0.5, False), (SCHEDULE, True)], ids=["number", "schedule, jitted"]
)
@pytest.mark.parametrize("name", PARTS)
def test_what_is_frozen_keeps_every_bit(name, rate, jit):
    target, frozen = PARTS[name]
    tx = lm.scale_decay(rate, [(target, None), ("trunk", None)])
    update = jax.jit(tx.update) if jit else tx.update
    updates, _ = update(SPOILED, tx.init(PARAMS), PARAMS)
    assert bits(updates["trunk"]) == bits(SPOILED["trunk"])
    kernel, before = (np.asarray(x["head"]["kernel"]) for x in (updates, SPOILED))
    frozen = np.array(frozen)
    assert kernel[frozen].tobytes() == before[frozen].tobytes()
    rate = 0.5 if callable(rate) else rate
    expected = before + np.float32(rate) * np.asarray(PARAMS["head"]["kernel"])
    np.testing.assert_array_equal(kernel[~frozen], expected[~frozen])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("rate", [0.1, -0.1, np.inf, np.nan])
def test_no_rate_reaches_what_is_frozen(rate, jit):
    """Not even in the bits of a NaN, in the sign of a zero, or in a subnormal number."""
    odd = np.array([0x7FC01234, 0xFFC01234, 0x80000000, 0, 0x7F800000, 1, 0x80000001], np.uint32)
    odd = jnp.asarray(odd).view(jnp.float32)
    updates = {"a": odd, "b": jnp.stack([odd, odd])}
    params = jax.tree.map(jnp.ones_like, updates)
    tx = lm.scale_decay(rate, [("a", None), (lm.rows("b", 0), None)])
    found, _ = (jax.jit(tx.update) if jit else tx.update)(updates, tx.init(params), params)
    assert bits(found["a"]) == bits(updates["a"])
    assert bits(found["b"][0]) == bits(updates["b"][0])


# ---- the three orders ---------------------------------------------------------------------------

# One number each. The first step of Adam is the sign of the gradient, but for its epsilon.
SCALARS = {"kernel": 4.0, "slow": -2.0, "bias": 8.0, "frozen": 6.0}
SLOPES = {"kernel": -1.0, "slow": 3.0, "bias": -0.5, "frozen": 1.0}
LEARNING, DECAY = 0.1, 0.5
RATE = {"kernel": 1.0, "slow": 0.1, "bias": 1.0, "frozen": 0.0}
DECAYS = [("bias", None), ("slow", 0.5)]
DECAYED = {"kernel": DECAY * 4.0, "slow": DECAY * 0.5 * -2.0, "bias": 0.0, "frozen": DECAY * 6.0}
RULES = [("slow", 0.1), ("frozen", None)]
ADAM = {"eps": 1e-12}


def orders():
    """Name, transformation, and the update of each parameter."""
    decay = lm.scale_decay(DECAY, DECAYS)
    adam, rate = optax.scale_by_adam(**ADAM), optax.scale_by_learning_rate(LEARNING)
    rules, frozen = lm.scale_by_rules(RULES), [("frozen", None)]

    def each(of):
        return {name: of(name) for name in SCALARS}

    # kernel: the sign of -1 + 2; slow: that of 3 - 0.5; bias: that of -0.5.
    regularized = each(lambda n: -LEARNING * RATE[n] * np.sign(SLOPES[n] + DECAYED[n]))
    following = each(lambda n: -LEARNING * RATE[n] * (np.sign(SLOPES[n]) + DECAYED[n]))
    apart = each(lambda n: -LEARNING * (RATE[n] * np.sign(SLOPES[n]) + DECAYED[n]))
    at_rest = apart | {"frozen": 0.0}
    first, second = optax.chain(decay, adam, rate), optax.chain(adam, decay, rate)
    third = optax.chain(adam, rules, decay, rate)
    yield "first", optax.chain(first, rules), regularized
    yield "first, wrapped", lm.wrap(first, RULES), regularized
    yield "first, compact", lm.wrap(first, RULES, compact=True), regularized
    yield "second", optax.chain(second, rules), following
    yield "second, wrapped", lm.wrap(second, RULES), following
    yield "third without its end", third, apart
    yield "third", optax.chain(third, lm.scale_by_rules(frozen)), at_rest
    yield "third, wrapped", lm.wrap(third, frozen), at_rest


@pytest.mark.parametrize("name", [name for name, _, _ in orders()])
def test_the_orders_by_hand(name):
    tx, wanted = {each: rest for each, *rest in orders()}[name]
    params, grads = (jax.tree.map(jnp.float32, x) for x in (SCALARS, SLOPES))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for each, value in wanted.items():
        np.testing.assert_allclose(updates[each], value, rtol=1e-4, atol=0, err_msg=each)
    if wanted["frozen"] == 0:
        after = optax.apply_updates(params, updates)
        assert bits(after["frozen"]) == bits(params["frozen"])


def test_the_orders_differ():
    """As their docstring says: in what of the decay the multipliers on the rate reach."""
    wanted = {name: values for name, _, values in orders()}
    assert [wanted[name]["slow"] for name in ("first", "second", "third")] == pytest.approx(
        [-0.01, -0.01 * 0.5, -0.1 * (0.1 - 0.5)]
    )
    assert wanted["first"]["kernel"] == pytest.approx(-0.1)
    assert wanted["second"]["kernel"] == pytest.approx(-0.1)
    assert wanted["third without its end"]["frozen"] == pytest.approx(-0.1 * 3)


def test_the_first_order_is_a_penalty():
    """Over many steps, moments included: half the rate times the squares is added to the loss."""
    share = {"head": {"kernel": 1.0, "bias": 0.0}, "norm": {"scale": 0.5}, "trunk": 1.0}
    decay = lm.scale_decay(0.2, [("**/bias", None), ("norm", 0.5)])

    def loss(params):
        return sum(jnp.sum(jnp.sin(p + i)) for i, p in enumerate(jax.tree.leaves(params)))

    def penalized(params):
        squares = jax.tree.map(lambda p, s: 0.1 * s * jnp.sum(p**2), params, share)
        return loss(params) + sum(jax.tree.leaves(squares))

    ways = []
    for of, tx in ((loss, optax.chain(decay, optax.adam(0.1))), (penalized, optax.adam(0.1))):

        @jax.jit
        def step(params, state, of=of, tx=tx):
            updates, state = tx.update(jax.grad(of)(params), state, params)
            return optax.apply_updates(params, updates), state

        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(6):
            params, state = step(params, state)
        ways.append(params)
    for a, b in zip(*map(jax.tree.leaves, ways), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- steps --------------------------------------------------------------------------------------


def test_rates_and_multipliers_that_change():
    """Decay of ones, without gradients: what is added is the rate times the multiplier."""
    params = {name: jnp.ones(2) for name in ("late", "early", "plain", "rows")}
    rules = [
        ("late", lm.During(2.0, start=2)),
        ("early", lm.During(0.5, stop=2)),
        (lm.rows("rows", 0), lambda step: 1.0 * step),
    ]
    rate = optax.piecewise_constant_schedule(1.0, {1: 0.5})  # 1, 0.5, 0.5, 0.5
    tx = lm.scale_decay(rate, rules)
    state, update = tx.init(params), jax.jit(tx.update)
    zeros = jax.tree.map(lambda p: jnp.full_like(p, -0.0), params)
    seen = []
    for _ in range(4):
        updates, state = update(zeros, state, params)
        seen.append({name: np.asarray(u).tolist() for name, u in updates.items()})
    assert [step["late"] for step in seen] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert [step["early"] for step in seen] == [[0.5, 0.5], [0.25, 0.25], [0, 0], [0, 0]]
    assert [step["plain"] for step in seen] == [[1, 1], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    assert [step["rows"] for step in seen] == [[0, 1], [0.5, 0.5], [1, 0.5], [1.5, 0.5]]
    signs = [np.signbit(step[name]).all() for name in ("late", "early") for step in seen]
    assert signs == [True, True, False, False, False, False, True, True]  # no bit changed at rest


def test_a_schedule_at_rest_keeps_every_bit():
    tx = lm.scale_decay(0.5, [(..., lm.During(1.0, start=1))])
    updates, state = jax.jit(tx.update)(SPOILED, tx.init(PARAMS), PARAMS)
    assert bits(updates) == bits(SPOILED)
    updates, _ = jax.jit(tx.update)(SPOILED, state, PARAMS)
    assert bits(updates) != bits(SPOILED)


def test_multipliers_known_at_run_time():
    def added(rate, multiplier):
        tx = lm.scale_decay(rate, [("trunk", multiplier), ("head", None)])
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        return (updates["trunk"] - GRADS["trunk"])[0]

    rates, multipliers = jnp.array([0.1, 0.5]), jnp.array([0.0, -1.0])
    found = jax.vmap(added)(rates, multipliers)
    np.testing.assert_allclose(found, rates * multipliers * 2.0, rtol=1e-5)
    slopes = jax.jit(jax.grad(added, argnums=(0, 1)))(jnp.float32(0.5), jnp.float32(0.0))
    np.testing.assert_allclose(slopes, [0.0, 0.5 * 2.0], rtol=1e-6)


STATEFUL = [
    (lm.elements("head/kernel", EYE), lm.During(0.5, start=1)),
    (lm.elements("head/kernel", ~EYE), 0.5),
    ("norm", lm.During(3.0, stop=2)),
]


@pytest.mark.parametrize("jit", [False, True])
def test_a_state_that_was_saved_goes_on(jit):
    tx = lm.scale_decay(SCHEDULE, STATEFUL)
    whole, _ = run(tx, 4, jit=jit)
    before, state = run(tx, 2, jit=jit)
    leaves, treedef = jax.tree.flatten(state)
    assert [leaf.shape for leaf in leaves] == [(), (2, 1), (2, 1), ()]
    assert jax.tree.structure(jax.eval_shape(tx.init, PARAMS)) == treedef
    state = treedef.unflatten([jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    params = PARAMS
    for updates in before:
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))
    for i in (2, 3):
        grads = jax.tree.map(lambda g: g * (1 + i), GRADS)  # noqa: B023
        updates, state = (jax.jit(tx.update) if jit else tx.update)(grads, state, params)
        assert bits(updates) == bits(whole[i])
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))


def test_the_state_is_no_larger_than_it_must_be():
    assert jax.tree.leaves(lm.scale_decay(0.1, [("head", 0.5)]).init(PARAMS)) == []
    assert len(jax.tree.leaves(lm.scale_decay(SCHEDULE, [("head", 0.5)]).init(PARAMS))) == 1
    assert len(jax.tree.leaves(lm.scale_decay(0.1, [("head", SCHEDULE)]).init(PARAMS))) == 1
    tx = lm.scale_decay(SCHEDULE, STATEFUL)
    assert bits(jax.jit(tx.init)(PARAMS)) == bits(tx.init(PARAMS))
    assert jax.tree.structure(tx.init({})) == jax.tree.structure(tx.init(PARAMS))
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, tx.init(PARAMS))
    assert bits(doubled) == bits(tx.init(PARAMS))  # nothing in it is like a parameter


# ---- kinds of arrays ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "jit"),
    [
        ("bfloat16", False),
        ("float16", True),
        ("float8_e4m3fn", True),
        ("complex64", True),
    ],
)
def test_dtypes_stay(dtype, jit):
    params = {"whole": jnp.full(4, 1.1, dtype), "part": jnp.full((2, 2), 1.1, dtype)}
    params |= {"frozen": jnp.full(2, 1.1, dtype), "plain": jnp.full(2, 1.1, dtype)}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.5), params)
    rules = [("whole", 0.3), (lm.rows("part", 0), None), (lm.elements("part", EYE), 0.3)]
    tx = lm.scale_decay(0.5, [*rules, ("frozen", None)])
    updates, _ = (jax.jit(tx.update) if jit else tx.update)(grads, tx.init(params), params)
    wide = np.complex64 if dtype == "complex64" else np.float32
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    scaled = (np.asarray(params["whole"]).astype(wide) * np.float32(0.3)).astype(dtype)
    half = np.asarray(0.5, dtype)
    wanted = np.asarray(grads["whole"]) + half * scaled
    found = np.asarray(updates["whole"]).astype(wide)
    # A compiled step may leave out a rounding between the product and the sum.
    precision = 0.07 if dtype.startswith("float8") else 0.01
    np.testing.assert_allclose(found, np.asarray(wanted).astype(wide), rtol=precision * jit)
    assert bits(updates["frozen"]) == bits(grads["frozen"])
    assert bits(updates["part"][0]) == bits(grads["part"][0])
    part = np.asarray(updates["part"][1]).astype(wide)
    assert part[1] == pytest.approx(complex(found[0]) if wide is np.complex64 else found[0])
    assert part[0] == np.asarray(updates["plain"]).astype(wide)[0]


def test_what_is_no_float_does_not_decay():
    params = {
        "ints": jnp.arange(3),
        "flags": jnp.array([True, False]),
        "key": jax.random.key(0),
        "floats": jnp.ones(2),
        "none": None,
    }
    grads = params | {"floats": jnp.full(2, 2.0)}
    tx = lm.scale_decay(0.5, [("floats", 2), ("ints", 0.5)])
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(grads, tx.init(params), params)
        assert bits(updates["ints"]) == bits(params["ints"])
        assert updates["ints"].dtype == jnp.int32
        assert bits(updates["flags"]) == bits(params["flags"])
        assert updates["key"].dtype == params["key"].dtype
        assert updates["none"] is None
        assert updates["floats"].tolist() == [3, 3]


def test_gradients_that_are_none_or_float0():
    params = {"steps": jnp.arange(3), "w": jnp.ones(2), "held": jnp.ones(2)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params) | {"held": None}
    tx = lm.scale_decay(0.5, [("held", 0.5)])
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["steps"] is grads["steps"]
    assert updates["held"] is None
    assert updates["w"].tolist() == [2.5, 2.5]


def test_arrays_of_numpy_and_numbers():
    params = {"array": np.float32([1, 2]), "number": 3.0, "rows": np.ones((2, 2), np.float32)}
    grads = jax.tree.map(lambda p: 0 * p, params)
    tx = lm.scale_decay(0.5, [("array", 0.5), ("number", 2), (lm.rows("rows", 0), None)])
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["array"], [0.25, 0.5])
    np.testing.assert_array_equal(updates["rows"], [[0, 0], [0.5, 0.5]])
    assert float(updates["number"]) == 3


def test_trees_of_no_arrays():
    tx = lm.scale_decay(0.5, [])
    for tree in ({}, [], {"a": None}, {"a": optax.MaskedNode()}):
        updates, _ = tx.update(tree, tx.init(tree), tree)
        assert updates == tree
    empty = {"a": jnp.zeros((0, 3))}
    updates, _ = tx.update(empty, tx.init(empty), empty)
    assert updates["a"].shape == (0, 3)
    array = jnp.ones(2)
    updates, _ = tx.update(array, tx.init(array), array)
    assert updates.tolist() == [1.5, 1.5]


# ---- in other places ----------------------------------------------------------------------------


def test_one_trace_for_a_run():
    tx = lm.scale_decay(SCHEDULE, STATEFUL)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        params, state = step(params, state)
    assert len(traces) == 1

    def scanned(carry, _):
        return step(*carry), None

    again, _ = jax.lax.scan(scanned, (PARAMS, tx.init(PARAMS)), length=5)
    for a, b in zip(*map(jax.tree.leaves, (again, (params, state))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_below_masked():
    """What is masked is a hole, in which any rule may have meant something."""
    mask = {"head": True, "norm": False, "trunk": True}
    tx = optax.masked(lm.scale_decay(0.5, [("trunk", None), ("norm/scale", 3)]), mask)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(GRADS, tx.init(PARAMS), PARAMS)
        assert bits([updates["norm"], updates["trunk"]]) == bits([GRADS["norm"], GRADS["trunk"]])
        np.testing.assert_allclose(
            updates["head"]["bias"], GRADS["head"]["bias"] + 0.5 * PARAMS["head"]["bias"], rtol=1e-6
        )


def test_below_partition():
    labels = {"head": "a", "norm": "b", "trunk": "b"}
    tx = optax.partition(
        {"a": lm.scale_decay(0.5, [("**/bias", None)]), "b": lm.scale_decay(0.5, [("norm", 2)])},
        labels,
    )
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    plain, _ = lm.scale_decay(0.5, [("**/bias", None), ("norm", 2)]).update(
        GRADS, lm.scale_decay(0.5, [("**/bias", None), ("norm", 2)]).init(PARAMS), PARAMS
    )
    assert bits(updates) == bits(plain)


def test_below_multi_steps():
    """It sees the mean of the gradients, and counts whole steps."""
    inner = optax.chain(lm.scale_decay(SCHEDULE, [("head", lm.During(1.0, 1))]), optax.sgd(0.1))
    tx = optax.MultiSteps(inner, 2)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    doubled = jax.tree.map(lambda g: 3 * g, GRADS)
    seen = []
    for grads in (GRADS, doubled, GRADS, doubled):
        updates, state = update(grads, state, PARAMS)
        seen.append(updates)
    mean = jax.tree.map(lambda g: 2 * g, GRADS)
    state = inner.init(PARAMS)
    for found in seen[1::2]:
        wanted, state = inner.update(mean, state, PARAMS)
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(seen[0]))


def test_with_hyperparameters():
    tx = optax.inject_hyperparams(lm.scale_decay)(weight_decay=0.5, rules=(("head", None),))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    updates, state = update(zeros, state, PARAMS)
    np.testing.assert_allclose(updates["trunk"], 0.5 * PARAMS["trunk"])
    state.hyperparams["weight_decay"] = jnp.float32(0.25)
    updates, state = update(zeros, state, PARAMS)
    np.testing.assert_allclose(updates["trunk"], 0.25 * PARAMS["trunk"])
    assert not np.any(updates["head"]["kernel"])


@pytest.mark.parametrize(("compact", "jit"), [(False, False), (False, True), (True, True)])
def test_inside_wrap(compact, jit):
    """What the rates freeze is not there; rules on it, and beside it, mean what they did."""
    rates = [("norm", None), (lm.rows("head/kernel", 0), None), ("trunk", 0.5)]
    decays = [("norm", 2), ("head/bias", None), (lm.along("head/kernel", -1, 1), 0.5)]
    if not compact:
        decays.insert(0, (lm.elements("head/kernel", EYE), None))
    inner = optax.chain(optax.scale_by_adam(), lm.scale_decay(0.5, decays))
    wrapped, _ = run(lm.wrap(inner, rates, compact=compact), jit=jit)
    chained, _ = run(optax.chain(inner, lm.scale_by_rules(rates)), jit=jit)
    for a, b in zip(wrapped, chained, strict=True):
        for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    for updates in wrapped:
        assert np.signbit(updates["norm"]["scale"]).all()
        assert not np.any(updates["norm"]["scale"])
        assert not np.any(updates["head"]["kernel"][0])
        assert np.any(updates["head"]["kernel"][1])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.LayerNorm(2, rngs=rngs)


def test_in_an_optimizer_of_nnx():
    model = Net(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    decay = lm.scale_decay(0.5, [("norm", None), ("fc/bias", None), (lm.rows("fc/kernel", 0), 0.5)])
    optimizer = nnx.Optimizer(
        model, optax.chain(decay, optax.scale_by_learning_rate(0.1)), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: 0.0 * jnp.sum(model.norm(model.fc(jnp.ones((1, 2))))))(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    after = nnx.state(model)
    lm.assert_frozen(before, after, [("fc/kernel", 1), (..., None)])
    ratio = np.asarray(after["fc"]["kernel"][...]) / np.asarray(before["fc"]["kernel"][...])
    np.testing.assert_allclose(ratio, [[0.975] * 2, [0.95] * 2], rtol=1e-6)


def test_layers_of_a_stack_and_shared_arrays():
    params = {"layers": {"w": jnp.ones((3, 2))}, "embed": jnp.ones(2)}
    structure = lm.Structure(stacked={"layers": 0}, shared=[["embed", "head/kernel"]])
    tx = lm.scale_decay(1.0, [("layers[1:]", None), ("head", 0.5)], structure=structure)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert updates["layers"]["w"].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert updates["embed"].tolist() == [0.5, 0.5]


def test_extra_arguments_are_passed_over():
    tx = lm.scale_decay(0.5, [("head", None)])
    plain, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    extra, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=1.0, grad=GRADS)
    assert bits(plain) == bits(extra)


def test_what_does_not_decay_costs_nothing():
    def operations(tx):
        return len(jax.make_jaxpr(tx.update)(GRADS, tx.init(PARAMS), PARAMS).jaxpr.eqns)

    plain = operations(optax.add_decayed_weights(0.5))
    counts = {
        "nothing": [(..., None)],
        "all": [],
        "some": [("trunk", None), ("norm", 1)],
        "slowly": [("trunk", 0.5)],
    }
    counts = {name: operations(lm.scale_decay(0.5, rules)) for name, rules in counts.items()}
    one = plain // 4
    assert counts == {"nothing": 0, "all": 4 * one, "some": 3 * one, "slowly": 4 * one + 1}


def test_no_constant_of_the_size_of_an_array():
    params = {"w": spec(2048, 1024), "v": spec(2048, 1024)}
    mask = np.random.default_rng(0).random((2048, 1024)) < 0.5
    rules = [(lm.elements("w", mask), None), (lm.rows("v", slice(0, 2048, 2)), 0.5)]
    tx = lm.scale_decay(SCHEDULE, rules)
    lowered = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params)
    assert max(constants(lowered)) <= LARGEST_CONSTANT


# ---- mistakes -----------------------------------------------------------------------------------


def test_it_needs_the_parameters():
    tx = lm.scale_decay(0.5, [("head", None)])
    with pytest.raises(ValueError, match=r"needs the parameters: update\(updates, state, params\)"):
        tx.update(GRADS, tx.init(PARAMS))
    chained = optax.chain(tx, optax.sgd(0.1))
    state = chained.init(PARAMS)
    with pytest.raises(ValueError, match="needs the parameters"):
        chained.update(GRADS, state)


@pytest.mark.parametrize(
    ("rules", "error", "says"),
    [
        ([("hed", None)], lm.UnmatchedRuleError, "rule 0 .*'head'"),
        ([("head", None), ("head/bias", 1)], lm.ShadowedRuleError, "rule 1"),
        ([(lm.rows("head/kernel", 9), None)], lm.IndexRangeError, "size 2"),
        ([(lm.elements("trunk", EYE), None)], lm.MaskError, "trunk"),
        ([("head[0]", None)], lm.PositionError, "unlike names"),
    ],
)
def test_mistakes_show_before_the_first_step(rules, error, says):
    tx = lm.scale_decay(0.5, rules)
    with pytest.raises(error, match=says):
        tx.init(PARAMS)
    with pytest.raises(error, match=says):
        jax.eval_shape(tx.init, PARAMS)


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ([("a[", None)], lm.PatternError),
        ([("a", True)], lm.MultiplierError),
        ([("a", "0.5")], lm.MultiplierError),
        (None, lm.RuleError),
        ("bias", lm.RuleError),
        (("bias", None), lm.RuleError),
    ],
)
def test_mistakes_that_show_at_once(rules, error):
    with pytest.raises(error):
        lm.scale_decay(0.5, rules)


@pytest.mark.parametrize(
    "rate",
    [None, "0.5", True, [("bias", None)], {"bias": 0}, np.ones(3)],
    ids=["null", "text", "bool", "list", "dict", "array"],
)
def test_a_rate_that_is_none(rate):
    with pytest.raises(lm.LrmultError, match="weight_decay"):
        lm.scale_decay(rate, 0.1)


def test_not_strict():
    tx = lm.scale_decay(0.5, [("hed", None), ("trunk", None)], strict=False)
    with pytest.warns(UserWarning, match="no path matches 'hed'"):
        state = tx.init(PARAMS)
    updates, _ = tx.update(GRADS, state, PARAMS)
    assert bits(updates["trunk"]) == bits(GRADS["trunk"])
    rules = lm.optional([("hed", None), ("trunk", None)])
    tx = lm.scale_decay(0.5, rules)
    assert bits(tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]) == bits(updates)


def test_states_of_others():
    plain, counting = lm.scale_decay(0.5, [("head", 0.5)]), lm.scale_decay(0.5, STATEFUL)
    for tx, state in (
        (plain, counting.init(PARAMS)),
        (counting, plain.init(PARAMS)),
        (plain, optax.EmptyState()),
        (counting, lm.scale_by_rules(STATEFUL).init(PARAMS)),
    ):
        with pytest.raises(lm.LrmultError, match="state"):
            tx.update(GRADS, state, PARAMS)
    other = [(STATEFUL[1][0], STATEFUL[0][1]), (STATEFUL[0][0], STATEFUL[1][1]), *STATEFUL[2:]]
    with pytest.raises(lm.MaskError, match="other element masks"):
        lm.scale_decay(0.5, other).update(GRADS, counting.init(PARAMS), PARAMS)


@pytest.mark.parametrize("rate", [jnp.float32(0.5), optax.constant_schedule(0.5)])
def test_a_rate_of_another_dtype_changes_none(rate):
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = lm.scale_decay(rate, [])
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    assert updates["w"].tolist() == [1.5] * 3
