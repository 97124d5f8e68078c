"""`scale_by_rules`: frozen bits, scaled rates, dtypes, and every wrapper of optax."""

import collections
import functools
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import lrmult as lm
from tests.devices import printed_on_four_devices
from tests.versions import enable_x64

RULES = [("trunk", None), ("slow", 0.1), ("fast", 3), ("back", -0.5)]
OPTIMIZERS = {
    "adamw": lambda rate=1e-2: optax.adamw(rate, weight_decay=0.1),
    "sgd": lambda rate=1e-2: optax.sgd(rate, momentum=0.9, nesterov=True),
    "lion": lambda rate=1e-2: optax.lion(rate, weight_decay=0.1),
    "adafactor": lambda rate=1e-2: optax.adafactor(rate, min_dim_size_to_factor=4),
    "lamb": lambda rate=1e-2: optax.lamb(rate, weight_decay=0.1),
    "muon": lambda rate=1e-2: optax.contrib.muon(rate, weight_decay=0.1),
}


def make_params(dtype=jnp.float32):
    def leaf(i, shape):
        values = jax.random.normal(jax.random.key(i), shape)
        return jnp.where(values > 1, -0.0, values).astype(dtype)

    names = ("trunk", "slow", "fast", "back", "free")
    return {n: {"w": leaf(i, (8, 6)), "b": leaf(10 + i, (6,))} for i, n in enumerate(names)}


def make_grads(params, step):
    return jax.tree.map(
        lambda p: (jnp.cos(p.astype(jnp.float32) * 3 + step)).astype(p.dtype), params
    )


def bits(array):
    return np.asarray(array).tobytes()


def train(tx, params, steps, grads=make_grads):
    @jax.jit
    def step(params, state, i):
        updates, state = tx.update(grads(params, i), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, i)
    assert step._cache_size() == 1
    return params


@pytest.mark.parametrize("poison", [None, jnp.nan, jnp.inf], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_bits_never_change(name, poison):
    def grads(params, i):
        found = make_grads(params, i)
        if poison is not None:
            found["trunk"] = jax.tree.map(lambda g: jnp.full_like(g, poison), found["trunk"])
        return found

    params = make_params()
    assert any(b"\x00\x00\x00\x80" in bits(leaf) for leaf in jax.tree.leaves(params["trunk"]))
    tx = optax.chain(OPTIMIZERS[name](), lm.scale_by_rules(RULES))
    after = train(tx, params, 50, grads)
    for key in ("w", "b"):
        assert bits(after["trunk"][key]) == bits(params["trunk"][key])
        for moving in ("slow", "fast", "back", "free"):
            assert np.isfinite(after[moving][key]).all()
            assert (np.asarray(after[moving][key]) != np.asarray(params[moving][key])).any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_bits_do_change_without_the_rules(name):
    params = make_params()
    after = train(OPTIMIZERS[name](), params, 2)
    assert bits(after["trunk"]["w"]) != bits(params["trunk"]["w"])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("part", "multiplier"), [("slow", 0.1), ("fast", 3.0), ("free", 1.0)])
def test_a_multiplier_is_a_multiplied_learning_rate(name, part, multiplier):
    params = make_params()
    tx = optax.chain(OPTIMIZERS[name](), lm.scale_by_rules(RULES))
    together = train(tx, params, 20)[part]
    alone = train(OPTIMIZERS[name](1e-2 * multiplier), params[part], 20)
    chex.assert_trees_all_close(together, alone, rtol=2e-5, atol=2e-6)


def test_a_negative_multiplier_climbs():
    params = {"back": jnp.array([1.0, -2.0])}
    tx = optax.chain(optax.sgd(0.1), lm.scale_by_rules([("back", -0.5)]))
    updates, _ = tx.update({"back": jnp.array([1.0, 1.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["back"], [0.05, 0.05], rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_a_frozen_update_is_negative_zero(jit):
    tx = lm.scale_by_rules([(..., None)])
    update = jax.jit(tx.update) if jit else tx.update
    grads = {"f": jnp.array([1.0, -1.0, jnp.nan]), "c": jnp.array([1 + 2j, jnp.nan])}
    out, _ = update(grads, optax.EmptyState())
    assert bits(out["f"]) == bits(np.array([-0.0] * 3, np.float32))
    assert bits(out["c"]) == bits(np.array([complex(-0.0, -0.0)] * 2, np.complex64))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "float64"],
)
def test_dtypes_are_kept(dtype, jit):
    with enable_x64(dtype == "float64"):
        grads = {name: jnp.ones(3, dtype) for name in ("trunk", "slow", "fast", "back", "free")}
        tx = lm.scale_by_rules(RULES)
        out, _ = (jax.jit(tx.update) if jit else tx.update)(grads, optax.EmptyState())
        for name, leaf in out.items():
            assert leaf.dtype == jnp.dtype(dtype), name
            assert not leaf.weak_type


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("multiplier", [0.1, 1 / 3, -7.7])
def test_small_floats_are_rounded_once(dtype, multiplier, jit):
    every = np.arange(2**16, dtype=np.uint16).view(np.dtype(dtype))
    tx = lm.scale_by_rules(multiplier)
    out, _ = (jax.jit(tx.update) if jit else tx.update)(jnp.asarray(every), optax.EmptyState())
    with np.errstate(over="ignore", invalid="ignore"):
        product = every.astype(np.float32) * np.float32(multiplier)
        exact = product.astype(np.dtype(dtype))
    # Numbers that are subnormal in float32 are flushed by the CPU backend.
    factors = np.stack([every.astype(np.float32), product])
    normal = (np.abs(factors) >= np.finfo(np.float32).tiny) | (factors == 0)
    known = np.isfinite(product) & normal.all(axis=0)
    assert known.sum() > 60_000
    np.testing.assert_array_equal(np.asarray(out)[known], exact[known])


def test_f64_is_scaled_in_f64():
    with enable_x64(True):
        out, _ = lm.scale_by_rules(0.1).update(jnp.array([1.0, 3.0]), optax.EmptyState())
        np.testing.assert_array_equal(out, np.array([0.1, 3 * 0.1]))


@pytest.mark.parametrize("jit", [False, True])
def test_what_is_no_float_passes_through(jit):
    grads = {
        "int": jnp.array([3, -4]),
        "bool": jnp.array([True, False]),
        "key": jax.random.key(0),
        "uint": jnp.array([7], jnp.uint8),
    }
    tx = lm.scale_by_rules(0.1)
    out, _ = (jax.jit(tx.update) if jit else tx.update)(grads, optax.EmptyState())
    for name in grads:
        assert out[name].dtype == grads[name].dtype
    np.testing.assert_array_equal(out["int"], grads["int"])
    np.testing.assert_array_equal(out["bool"], grads["bool"])
    np.testing.assert_array_equal(out["uint"], grads["uint"])
    frozen, _ = lm.scale_by_rules([(..., None)]).update(grads, optax.EmptyState())
    np.testing.assert_array_equal(frozen["int"], [0, 0])
    assert frozen["int"].dtype == jnp.int32
    assert frozen["bool"].dtype == bool
    np.testing.assert_array_equal(frozen["bool"], [False, False])


def test_float0_and_numpy_pass_through():
    grads = {"none": np.zeros(2, jax.dtypes.float0), "numpy": np.array([1.0, 2.0])}
    for multiplier in (None, 0.5):
        out, _ = lm.scale_by_rules([(..., multiplier)]).update(grads, optax.EmptyState())
        assert out["none"].dtype == jax.dtypes.float0
        assert out["numpy"].dtype == np.float64
        np.testing.assert_array_equal(out["numpy"], grads["numpy"] * (multiplier or 0))


def test_the_product_obeys_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        grads = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2, jnp.complex64)}
        for multiplier in (0.5, None):
            tx = lm.scale_by_rules([(..., multiplier)])
            jax.jit(tx.update)(grads, optax.EmptyState())


def test_a_multiplier_of_one_adds_nothing():
    grads = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = lm.scale_by_rules([("a", 1), ("b", 1.0)])
    out, _ = tx.update(grads, optax.EmptyState())
    assert out["a"] is grads["a"]
    jaxpr = jax.make_jaxpr(lambda g: tx.update(g, optax.EmptyState())[0])(grads)
    assert not jaxpr.eqns


def test_static_multipliers_cost_no_instruction():
    params = make_params()

    def count(step, *args):
        text = jax.jit(step).lower(*args).compile().as_text()
        instructions = re.findall(r"^ +(?:ROOT )?%?[\w.-]+ = \S+ ([\w-]+)\(", text, re.MULTILINE)
        entry = text[text.index("\nENTRY") :]
        return collections.Counter(instructions), entry[: entry.index("\n}")].count(" = ")

    def count_step(tx):
        def step(grads, state, params):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return count(step, params, tx.init(params), params)

    rules = RULES[1:]
    plain, kernels = count_step(optax.adamw(1e-2))
    ruled, ruled_kernels = count_step(optax.chain(optax.adamw(1e-2), lm.scale_by_rules(rules)))
    assert sum(plain.values()) > 100
    assert ruled_kernels == kernels
    # XLA takes the product of two constants ahead; from jaxlib 0.12 on it multiplies twice, within
    # the loop that reads and writes the array.
    once, twice = (count(f, jnp.ones(3))[0] for f in (lambda x: x * 6, lambda x: x * 2 * 3))
    added = ruled - plain
    if twice["multiply"] == once["multiply"]:
        assert not added
    else:
        scaled = sum(leaf.multiplier != 1 for leaf in lm.compile_rules(rules, params).leaves)
        assert added.keys() == {"multiply", "constant", "broadcast"}
        assert set(added.values()) == {scaled}
    assert not plain - ruled


# Inside and around optax's own wrappers ------------------------------------------------------


def expected_updates(params):
    """One step of sgd(1) with gradients of one, under RULES."""
    scale = {"trunk": 0.0, "slow": -0.1, "fast": -3.0, "back": 0.5, "free": -1.0}
    return {n: jax.tree.map(lambda p, s=scale[n]: jnp.full_like(p, s), params[n]) for n in params}


def ruled_sgd(rate=1.0):
    return optax.chain(optax.sgd(rate), lm.scale_by_rules(RULES))


def everything(params):
    return jax.tree.map(lambda _: True, params)


def only(names):
    def mask(params):
        return {n: jax.tree.map(lambda _, inside=n in names: inside, params[n]) for n in params}

    return mask


WRAPPED = {
    "masked, all in": lambda: optax.masked(ruled_sgd(), everything),
    "partition": lambda: optax.partition(
        {"ruled": ruled_sgd(), "plain": optax.sgd(1.0)},
        {n: "plain" if n == "free" else "ruled" for n in (*dict(RULES), "free")},
    ),
    "MultiSteps": lambda: optax.MultiSteps(ruled_sgd(), 1).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(ruled_sgd(), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(ruled_sgd)(rate=1.0),
    "inject_hyperparams of the rules": lambda: optax.chain(
        optax.sgd(1.0), optax.inject_hyperparams(lm.scale_by_rules)(rules=lm.Rules(RULES))
    ),
    "named_chain": lambda: optax.named_chain(
        ("sgd", optax.sgd(1.0)), ("rules", lm.scale_by_rules(RULES))
    ),
    "with extra args": lambda: optax.with_extra_args_support(ruled_sgd()),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", WRAPPED)
def test_works_inside_every_wrapper(name, jit):
    params = make_params()
    tx = WRAPPED[name]()
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), state)
    update = jax.jit(tx.update) if jit else tx.update
    ones = jax.tree.map(jnp.ones_like, params)
    updates, state = update(ones, state, params)
    chex.assert_trees_all_close(updates, expected_updates(params), rtol=1e-6)
    updates, state = update(ones, state, params)
    chex.assert_trees_all_close(updates, expected_updates(params), rtol=1e-6)
    if jit:
        assert update._cache_size() == 1
    # map_params calls `init` with a placeholder that has no leaves.
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    chex.assert_trees_all_equal_structs(mapped, state)


def test_multi_steps_accumulates():
    params = make_params()
    tx = optax.MultiSteps(ruled_sgd(), 3).gradient_transformation()
    ones = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    for i in range(3):
        updates, state = jax.jit(tx.update)(ones, state, params)
        wanted = expected_updates(params) if i == 2 else jax.tree.map(jnp.zeros_like, params)
        chex.assert_trees_all_close(updates, wanted, rtol=1e-6)


@pytest.mark.parametrize("hidden", ["trunk", "slow", "fast"])
def test_rules_for_what_a_mask_hides_are_no_mistake(hidden):
    params = make_params()
    tx = optax.masked(lm.scale_by_rules(RULES), only(set(params) - {hidden}))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    wanted = jax.tree.map(jnp.negative, expected_updates(params)) | {hidden: ones[hidden]}
    chex.assert_trees_all_close(updates, wanted, rtol=1e-6)


def test_a_typo_is_a_mistake_below_a_mask_too():
    params = make_params()
    tx = optax.masked(lm.scale_by_rules([("tronk", None)]), only({"slow", "fast"}))
    with pytest.raises(lm.UnmatchedRuleError, match="rule 0 \\('tronk' -> frozen\\)"):
        tx.init(params)


def test_holes_stay_holes():
    grads = {"a": jnp.ones(2), "b": None, "c": optax.MaskedNode()}
    tx = lm.scale_by_rules([("a", 0.5), ("b", 2), ("c", 3)])
    out, _ = tx.update(grads, tx.init(grads))
    assert out["b"] is None
    assert out["c"] == optax.MaskedNode()
    np.testing.assert_array_equal(out["a"], [0.5, 0.5])


def test_the_state_is_empty_and_init_can_be_traced():
    params = make_params()
    tx = lm.scale_by_rules(RULES)
    assert tx.init(params) == optax.EmptyState()
    assert jax.eval_shape(tx.init, params) == optax.EmptyState()
    assert jax.jit(tx.init)(params) == optax.EmptyState()
    assert tx.init({}) == optax.EmptyState()


def test_a_mistake_shows_at_init_and_in_a_traced_update():
    tx = lm.scale_by_rules([("hed", 1)])
    with pytest.raises(lm.UnmatchedRuleError, match="did you mean 'head'"):
        tx.init({"head": jnp.ones(2)})
    with pytest.raises(lm.UnmatchedRuleError, match="did you mean 'head'"):
        jax.jit(tx.update)({"head": jnp.ones(2)}, optax.EmptyState())
    with pytest.raises(lm.PatternError, match="rule 0"):
        lm.scale_by_rules([("a[", 1)])


def test_update_resolves_on_its_own_tree():
    tx = lm.scale_by_rules([("a/b", 0.5)])
    state = tx.init({"a": {"b": jnp.ones(2)}})
    out, _ = tx.update({"a/b": jnp.ones(2), "c": jnp.ones(1)}, state)
    np.testing.assert_array_equal(out["a/b"], [0.5, 0.5])


def test_extra_arguments_are_accepted():
    tx = optax.chain(optax.sgd(1.0), lm.scale_by_rules(0.5))
    params = jnp.ones(2)
    updates, _ = tx.update(jnp.ones(2), tx.init(params), params, value=1.0, grad=jnp.ones(2))
    np.testing.assert_array_equal(updates, [-0.5, -0.5])


def test_line_searches_around_it_still_run():
    params = {"a": jnp.array([2.0, 1.0]), "b": jnp.array([-0.0, 3.0])}
    solver = optax.chain(
        optax.scale_by_lbfgs(),
        lm.scale_by_rules([("b", None)]),
        optax.scale_by_backtracking_linesearch(20),
    )

    def loss(p):
        return jnp.sum((p["a"] - 1) ** 2) + jnp.sum((p["b"] - 1) ** 2)

    state, start = solver.init(params), params
    for _ in range(5):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = solver.update(
            jax.tree.map(jnp.negative, grad), state, params, value=value, grad=grad, value_fn=loss
        )
        params = optax.apply_updates(params, updates)
    assert bits(params["b"]) == bits(start["b"])
    assert loss(params) < loss(start)


def test_vmap_over_models():
    params = make_params()
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p, 3 * p]), params)
    tx = optax.chain(optax.adamw(1e-2), lm.scale_by_rules(RULES))

    def step(params):
        updates, _ = tx.update(make_grads(params, 0), tx.init(params), params)
        return optax.apply_updates(params, updates)

    together = jax.vmap(step)(many)
    for i in range(3):
        one = step(jax.tree.map(lambda p, i=i: p[i], many))
        chex.assert_trees_all_close(jax.tree.map(lambda p, i=i: p[i], together), one, rtol=1e-5)
    chex.assert_trees_all_equal(together["trunk"], many["trunk"])


def test_scan_over_steps():
    params = make_params()
    tx = optax.chain(optax.adamw(1e-2), lm.scale_by_rules(RULES))

    def body(carry, i):
        params, state = carry
        updates, state = tx.update(make_grads(params, i), state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(5))
    chex.assert_trees_all_close(scanned, train(tx, params, 5), rtol=1e-5, atol=1e-6)
    assert bits(scanned["trunk"]["w"]) == bits(params["trunk"]["w"])


def test_donated_buffers():
    tx = optax.chain(optax.adamw(1e-2), lm.scale_by_rules(RULES))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(make_grads(params, 0), state, params)
        return optax.apply_updates(params, updates), state

    params = make_params()
    before = bits(params["trunk"]["w"])
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert bits(params["trunk"]["w"]) == before
    assert step._cache_size() == 1


def test_the_plan_is_cached_across_instances():
    calls = []

    def predicate(path, leaf):
        calls.append(path)
        return leaf.ndim == 1

    params = make_params()
    rules = lm.Rules([(predicate, 0.5)])
    for _ in range(3):
        tx = lm.scale_by_rules(rules)
        tx.update(params, tx.init(params))
    assert len(calls) == len(lm.paths(params))
    other = jax.tree.map(lambda p: p[..., None], params)
    with pytest.raises(lm.UnmatchedRuleError):
        lm.scale_by_rules(rules).update(other, optax.EmptyState())


def test_the_cache_tells_strict_from_not_and_dtypes_apart():
    params = {"cached": jnp.ones((3, 1, 7))}
    rules = lm.Rules([("cahced", 2)])
    with pytest.warns(UserWarning, match="did you mean 'cached'"):
        lm.scale_by_rules(rules, strict=False).init(params)
    with pytest.raises(lm.UnmatchedRuleError):
        lm.scale_by_rules(rules).init(params)

    halve = lm.scale_by_rules([(lambda path, leaf: leaf.dtype == jnp.bfloat16, 0.5), (..., 1)])
    for dtype, wanted in ((jnp.bfloat16, 0.5), (jnp.float32, 1.0)):
        if dtype == jnp.float32:
            with pytest.raises(lm.UnmatchedRuleError):
                halve.update(jnp.ones(5, dtype), optax.EmptyState())
            continue
        out, _ = halve.update(jnp.ones(5, dtype), optax.EmptyState())
        assert out[0] == wanted


SHARDED = """
import jax, jax.numpy as jnp, optax, lrmult as lm
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, P("x", None))
    floats = {n: jnp.ones((8, 2)) for n in ("frozen", "scaled", "free")}
    ints = {"int": jnp.ones((8, 2), jnp.int32), "bool": jnp.ones((8, 2), bool)}
    grads = jax.device_put(floats | ints, sharding)
    rules = [("frozen", None), ("scaled", 0.5), ("int", None), ("bool", None)]
    tx = lm.scale_by_rules(rules)
    with jax.set_mesh(mesh):
        for update in (tx.update, jax.jit(tx.update)):
            out, _ = update(grads, optax.EmptyState())
            for name, leaf in out.items():
                if update is tx.update or name not in ("frozen", "int", "bool"):
                    assert leaf.sharding.is_equivalent_to(sharding, 2), (kind, name, leaf.sharding)
        params = jax.device_put(floats, sharding)
        chain = optax.chain(optax.adamw(0.1), lm.scale_by_rules(rules[:2]))
        def step(params, state):
            updates, state = chain.update(params, state, params)
            return optax.apply_updates(params, updates), state
        lowered = jax.jit(step).lower(params, chain.init(params))
        text = lowered.compile().as_text()
        for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert collective not in text, (kind, collective)
print("sharded as before")
"""


def test_sharding_is_kept_and_no_collective_is_added():
    assert printed_on_four_devices(SHARDED) == "sharded as before\n"


def test_no_constant_of_the_size_of_a_leaf_is_lowered():
    grads = {"frozen": jnp.ones((256, 256)), "slow": jnp.ones((256, 256))}
    tx = lm.scale_by_rules([("frozen", None), ("slow", 0.1)])
    text = jax.jit(tx.update).lower(grads, optax.EmptyState()).as_text()
    assert len(text) < 4000


def test_eager_updates_stay_on_one_device():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    grads = jax.device_put({"a": jnp.ones((4, 2)), "b": jnp.ones((4, 2))}, sharding)
    out, _ = lm.scale_by_rules([("a", None), ("b", 0.5)]).update(grads, optax.EmptyState())
    assert out["a"].sharding == sharding
    assert out["b"].sharding == sharding


def test_bfloat16_from_numpy_is_kept():
    update = np.array([1.0, 3.0], ml_dtypes.bfloat16)
    out, _ = lm.scale_by_rules(0.1).update(update, optax.EmptyState())
    assert out.dtype == ml_dtypes.bfloat16
