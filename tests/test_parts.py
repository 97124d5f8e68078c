"""Parts of arrays: what plans show of them, that frozen elements stay, and what is no part."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrmult as lm
from tests.devices import printed_on_four_devices

OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "lion": optax.lion(0.01, weight_decay=0.1),
    "adafactor": optax.adafactor(0.1, weight_decay_rate=0.01, min_dim_size_to_factor=4),
    "muon": optax.contrib.muon(0.1),
}
RNG = np.random.default_rng(0)


def layer(inputs=16, outputs=8, dtype=jnp.float32):
    """Weights that are ordinary, zero, negative zero, and infinite."""
    kernel = RNG.normal(size=(inputs, outputs)).astype(np.float32)
    kernel[0], kernel[1], kernel[2, 0] = 0.0, -0.0, np.inf
    return {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.full(outputs, -0.0, dtype)}


CHECKER = (np.add.outer(np.arange(16), np.arange(8)) % 2).astype(bool)
PARTS = {
    "neurons": [(lm.neurons("fc", [0, 1, 2]), None), ("fc", 0.1)],
    "rows": [(lm.rows("fc/kernel", slice(0, None, 3)), None)],
    "two axes": [(lm.rows("fc/kernel", [1, 2]), None), (lm.along("fc/kernel", 1, 0), 0)],
    "a box": [(lm.along(lm.rows("fc/kernel", slice(4)), 1, [2, 3]), None), ("fc/kernel", -1)],
    "elements": [(lm.elements("fc/kernel", CHECKER), None), (lm.neurons("fc", 7), 3)],
    "an outer product": [
        (lm.elements("fc/kernel", np.outer(CHECKER[:, 0], CHECKER[0])), None),
    ],
    "a schedule": [(lm.rows("fc/kernel", [0, 1, 2]), None), ("fc", optax.constant_schedule(0.0))],
    "a run-time value": [(lm.neurons("fc", [0, 1]), None), ("fc", jnp.float32(0.3))],
}


def bits(array):
    return np.asarray(array).view(f"u{array.dtype.itemsize}")


def frozen_places(plan):
    """Dense boolean arrays, whatever the form of the answer."""
    leaves, treedef = jax.tree.flatten(plan.frozen)
    shapes = [leaf.shape for leaf in plan.leaves]
    return treedef.unflatten(
        [
            leaf.dense() if isinstance(leaf, lm.Parts) else np.broadcast_to(leaf, shape)
            for leaf, shape in zip(leaves, shapes, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("optimizer", "dtype", "jitted"),
    [
        *((name, jnp.float32, True) for name in OPTIMIZERS),
        ("adamw", jnp.bfloat16, True),
        ("adamw", jnp.float32, False),
    ],
)
@pytest.mark.parametrize("rules", PARTS)
def test_frozen_elements_keep_every_bit(rules, optimizer, dtype, jitted):
    params = {"fc": layer(dtype=dtype), "head": layer(8, 3, dtype)}
    plan = lm.compile_rules(PARTS[rules], params)
    frozen = frozen_places(plan)
    tx = optax.chain(OPTIMIZERS[optimizer], lm.scale_by_rules(PARTS[rules]))
    grads = jax.tree.map(
        lambda p, here: jnp.where(here, jnp.nan, jnp.ones_like(p) * 0.01), params, frozen
    )

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jitted else step
    state, new = tx.init(params), params
    for _ in range(50 if jitted else 3):
        new, state = step(new, state)
    assert any(here.any() and not here.all() for here in jax.tree.leaves(frozen))
    for old, now, here in zip(*map(jax.tree.leaves, (params, new, frozen)), strict=True):
        assert now.dtype == dtype
        np.testing.assert_array_equal(bits(now)[here], bits(old)[here])
    if rules != "a schedule":
        assert (bits(new["head"]["bias"]) != bits(params["head"]["bias"])).all()


@pytest.mark.parametrize("rules", PARTS)
def test_what_is_not_frozen_follows_its_own_learning_rate(rules):
    params = {"fc": jax.tree.map(jnp.abs, layer()), "head": layer(8, 3)}
    plan = lm.compile_rules(PARTS[rules], params)
    grads = jax.tree.map(
        lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params
    )
    tx = optax.chain(optax.sgd(0.1), lm.scale_by_rules(PARTS[rules]))
    updates, _ = tx.update(grads, tx.init(params), params)
    for update, grad, factor in zip(
        *map(jax.tree.leaves, (updates, grads, plan.multipliers)), strict=True
    ):
        factor = factor.dense(0) if isinstance(factor, lm.Parts) else factor
        np.testing.assert_allclose(update, -0.1 * grad * factor, rtol=1e-6)


# ---- what a plan shows --------------------------------------------------------------------------

FC = {"fc1": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}


def test_neurons_are_columns_and_biases():
    plan = lm.compile_rules([(lm.neurons("fc1", [0, 1, 2]), None), ("fc1", 0.1)], FC)
    expected = np.array([0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.1])
    np.testing.assert_array_equal(plan.multipliers["fc1"]["bias"], expected)
    np.testing.assert_array_equal(plan.multipliers["fc1"]["kernel"], expected[None])
    np.testing.assert_array_equal(plan.frozen["fc1"]["kernel"], expected[None] == 0)
    assert plan.trainable == {"fc1": {"kernel": True, "bias": True}}
    bias, kernel = plan.leaves
    assert (bias.trained, bias.frozen, kernel.trained, kernel.frozen) == (5, 3, 20, 12)
    assert [claim.index for claim in kernel.rules] == [0, 1]
    text = " ".join(str(plan).split())
    assert "32 [:, 0:3] frozen; rest 0.1 0: neurons('fc1', [0, 1, 2]); 1: 'fc1'" in text
    assert "fc1/bias f32[8] 8 [0:3] frozen; rest 0.1" in text


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([(lm.rows("w", 0), 2)], "[0, :] 2; rest 1"),
        ([(lm.rows("w", -1), 2)], "[5, :] 2; rest 1"),
        ([(lm.rows("w", [0, 2, 4]), 2)], "[0:5:2, :] 2; rest 1"),
        ([(lm.rows("w", [0, 3]), 2)], "[[0, 3], :] 2; rest 1"),
        (
            [(lm.rows("w", [0, 1]), None), (lm.rows("w", [1, 2]), 3)],
            "[0:2, :] frozen; [2, :] 3; rest 1",
        ),
        ([(lm.rows("w", 0), None), (lm.rows("w", [0, 1]), None)], "[0:2, :] frozen; rest 1"),
        ([(lm.rows("w", [0, 1]), 1)], "1"),
        ([(lm.rows("w", 0), 2), (lm.along("w", 1, 1), 3)], "[0, :] 2; [:, 1] 3; rest 1"),
        ([(lm.along(lm.rows("w", 0), 1, 1), 3), ("w", None)], "[0, 1] 3; rest frozen"),
        ([(lm.elements("w", np.eye(6) > 0), None)], "6 of 36 elements frozen; rest 1"),
        (
            [(lm.rows("w", i), i + 2) for i in range(6)],
            "[0, :] 2; [1, :] 3; [2, :] 4; 2 more parts; [5, :] 7",
        ),
        (
            [(lm.rows("w", 0), optax.constant_schedule(1.0))],
            "[0, :] schedule constant_schedule; rest 1",
        ),
        ([(lm.rows("w", 0), jnp.float32(2))], "[0, :] run-time float32[]; rest 1"),
    ],
)
def test_the_table_shows_parts_on_one_line(rules, expected):
    plan = lm.compile_rules(rules, {"w": jnp.ones((6, 6)), "x": jnp.ones(3)})
    row = next(line for line in str(plan).splitlines() if line.startswith("w "))
    assert f"   {expected}   " in row


def test_an_outer_product_is_factored():
    rows, columns = np.array([1, 0, 1, 0], bool), np.array([0, 1, 1], bool)
    params = {"w": jnp.ones((4, 3))}
    plan = lm.compile_rules([(lm.elements("w", np.outer(rows, columns)), None)], params)
    [(region, value), (rest, one)] = plan.multipliers["w"].pairs
    assert (value, one, rest.vectors, rest.masks, region.masks) == (0.0, 1.0, {}, (), ())
    np.testing.assert_array_equal(region.vectors[0], rows)
    np.testing.assert_array_equal(region.vectors[1], columns)
    plan = lm.compile_rules([(lm.elements("w", np.outer(rows, np.ones(3)) > 0), None)], params)
    np.testing.assert_array_equal(plan.multipliers["w"], 1.0 - rows[:, None])


def test_parts_with_schedules_are_dense_at_a_step():
    rules = [
        (lm.rows("w", 0), optax.linear_schedule(0.0, 1.0, 4)),
        (lm.rows("w", 1), jnp.float32(5)),
    ]
    parts = lm.compile_rules(rules, {"w": jnp.ones((3, 2))}).multipliers["w"]
    np.testing.assert_array_equal(parts.dense(2), [[0.5, 0.5], [5, 5], [1, 1]])
    with pytest.raises(lm.RuleError, match=r"dense\(step\)"):
        parts.dense()


def test_an_index_may_be_written_in_many_ways():
    params = {"w": jnp.ones((6, 2))}
    same = [
        slice(1, 4),
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3]),
        jnp.array([3, 2, 1]),
    ]
    same += [
        [-5, -4, -3],
        np.array([0, 1, 1, 1, 0, 0], bool),
        [False, True, True, True, False, False],
    ]
    for index in same:
        plan = lm.compile_rules([(lm.rows("w", index), None)], params)
        np.testing.assert_array_equal(plan.frozen["w"][:, 0], [0, 1, 1, 1, 0, 0])
    assert not lm.compile_rules([(lm.rows("w", np.int64(3)), 2)], params).frozen["w"]


def test_a_mask_is_copied():
    mask = np.array([[True, False], [False, True]])
    rules = [(lm.elements("w", mask), None)]
    mask[:] = True
    plan = lm.compile_rules(rules, {"w": jnp.ones((2, 2))})
    np.testing.assert_array_equal(plan.frozen["w"].dense(), np.eye(2))


def test_parts_make_equal_rules_and_can_be_pickled():
    def rules():
        return lm.Rules(
            [
                (lm.neurons("fc1", [0, 1]), None),
                (lm.rows("fc1/kernel", np.array([True, False, True, False])), 2),
                (lm.elements(lm.along("fc1/kernel", -1, slice(2, None)), np.eye(4, 8) > 0), 3),
            ]
        )

    assert rules() == rules()
    assert hash(rules()) == hash(rules())
    assert pickle.loads(pickle.dumps(rules())) == rules()
    other = lm.elements(lm.along("fc1/kernel", -1, slice(2, None)), np.eye(4, 8)[::-1] > 0)
    assert lm.Rules([(other, 3)]) != rules()[2:]
    plan = lm.compile_rules(pickle.loads(pickle.dumps(rules())), FC)
    assert str(plan) == str(lm.compile_rules(rules(), FC))


# ---- what is no part ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: lm.rows("w", 0.5), lm.PatternError, r"rows\('w', 0.5\): 0.5 is no index"),
        (lambda: lm.rows("w", None), lm.PatternError, "None is no index"),
        (lambda: lm.rows("w", "0"), lm.PatternError, "'0' is no index"),
        (lambda: lm.rows("w", True), lm.PatternError, "True is no index"),
        (lambda: lm.rows("w", {0, 1}), lm.PatternError, "is no index"),
        (lambda: lm.rows("w", [0.0, 1.0]), lm.PatternError, "ints or bools"),
        (lambda: lm.rows("w", [[0], [1]]), lm.PatternError, "one axis"),
        (lambda: lm.rows("w", slice(0, 4, 0)), lm.PatternError, "step of 0"),
        (lambda: lm.rows("w", np.ones((2, 2), bool)), lm.MaskError, "elements"),
        (lambda: lm.along("w", "last", 0), lm.AxisError, "'last' is no axis"),
        (lambda: lm.along("w", None, 0), lm.AxisError, "None is no axis"),
        (lambda: lm.neurons("w", 0, axis=0.5), lm.AxisError, "no axis"),
        (lambda: lm.neurons(["fc1", "fc2"], 0), lm.PatternError, "no target"),
        (lambda: lm.neurons("a//b", 0), lm.PatternError, r"neurons\('a//b', 0\): .*two '/'"),
        (
            lambda: lm.elements("w", np.ones(3)),
            lm.MaskError,
            r"float64\[3\] is no mask.*weights == 0",
        ),
        (lambda: lm.elements("w", [0, 1]), lm.MaskError, "is no mask"),
        (lambda: lm.elements("w", "mask"), lm.MaskError, "is no mask"),
        (lambda: lm.elements("w", None), lm.MaskError, "is no mask"),
        (lambda: lm.rows("w", object()), lm.PatternError, "is no index"),
    ],
)
def test_a_part_that_cannot_be_read(make, error, says):
    with pytest.raises(error, match=says) as caught:
        make()
    assert type(caught.value) is error


def test_a_traced_index_or_mask_is_an_error():
    def traced(x):
        with pytest.raises(lm.PatternError, match="traced"):
            lm.rows("w", x.astype(int))
        with pytest.raises(lm.MaskError, match="traced"):
            lm.elements("w", x > 0)
        return x

    jax.jit(traced)(jnp.ones(3))


def test_a_mask_that_is_false_everywhere_matches_nothing():
    rules = [(lm.elements("fc1/kernel", np.zeros((4, 8), bool)), None)]
    with pytest.raises(lm.UnmatchedRuleError, match=r"rule 0 .*false everywhere.*fc1/kernel"):
        lm.compile_rules(rules, FC)
    assert lm.compile_rules(lm.optional(rules), FC).multipliers["fc1"]["kernel"] == 1.0
    with pytest.warns(UserWarning, match="false everywhere"):
        lm.compile_rules(rules, FC, strict=False)
    apart = lm.along(lm.along("fc1/bias", 0, [0, 1]), 0, [2])
    with pytest.raises(lm.UnmatchedRuleError, match="in common"):
        lm.compile_rules([(apart, 1)], FC)


def test_wildcards_pass_over_what_has_no_such_place():
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((8, 3)), "c": jnp.ones(2), "d": jnp.ones(())}
    plan = lm.compile_rules([(lm.rows("**", 5), None)], params)
    assert [leaf.frozen for leaf in plan.leaves] == [0, 3, 0, 0]
    plan = lm.compile_rules([(lm.along("*", 1, 0), None)], params)
    assert [leaf.frozen for leaf in plan.leaves] == [4, 8, 0, 0]
    with pytest.raises(lm.IndexRangeError, match="is out of range"):
        lm.compile_rules([(lm.rows("a", 10**30), None)], params)
    with pytest.raises(lm.IndexRangeError, match=r"rule 0 .* 9 is out of range"):
        lm.compile_rules([(lm.rows("{a,b}", 9), None)], params)
    optional = lm.compile_rules(lm.optional([(lm.rows("a", 9), None)]), params)
    assert optional.frozen["a"] is False


# ---- element masks in the state -----------------------------------------------------------------


def test_a_state_of_other_masks_is_refused():
    params = {"w": jnp.ones((2, 2))}
    one = lm.scale_by_rules([(lm.elements("w", np.eye(2) > 0), None)])
    two = lm.scale_by_rules([(lm.elements("w", np.array([[1, 1], [0, 1]]) > 0), None)])
    with pytest.raises(lm.MaskError, match="other rules"):
        two.update(params, one.init(params))
    big = {"w": jnp.ones((3, 9))}
    three = lm.scale_by_rules([(lm.elements("w", np.eye(3, 9) > 0), None)])
    with pytest.raises(lm.MaskError, match="other rules"):
        jax.jit(three.update)(big, one.init(params))
    for other in (optax.EmptyState(), ()):
        with pytest.raises(lm.RuleError, match="call init again"):
            one.update(params, other)


def test_a_mask_in_the_state_passes_through_save_and_restore():
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    tx = lm.scale_by_rules([(lm.elements("w", np.array([[1, 0, 0], [0, 1, 1]]) > 0), None)])
    state = tx.init(params)
    restored = jax.tree.map(lambda leaf: np.array(leaf), state)
    for _ in range(3):
        updates, restored = tx.update(params, restored)
        np.testing.assert_array_equal(updates["w"], [[0, 1, 2], [3, 0, 0]])
    assert int(restored.rules_step) == 3


def test_optax_maps_over_the_state():
    params = {"w": jnp.ones((3, 3))}
    tx = optax.chain(
        optax.adam(0.1),
        lm.scale_by_rules([(lm.elements("w", np.eye(3) > 0), None), (..., lambda step: 1.0)]),
    )
    state = tx.init(params)
    doubled = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert float(doubled[0][0].mu["w"][0, 0]) == 1
    np.testing.assert_array_equal(doubled[1].rules_masks[0], state[1].rules_masks[0])
    assert int(optax.tree_utils.tree_get(state, "rules_step")) == 0
    assert int(optax.tree_utils.tree_get(state, "count")) == 0


# ---- sharding -----------------------------------------------------------------------------------

SHARDED = """
import itertools
import jax, jax.numpy as jnp, numpy as np, optax, lrmult as lm
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mask = np.add.outer(np.arange(16), np.arange(64)) % 3 == 0
rules = [
    (lm.along("columns", 1, [0, 1, 5]), None),
    (lm.rows("rows", slice(3, 9)), None),
    (lm.rows("rows", 0), 0.5),
    (lm.rows("both", [1, 2]), None),
    (lm.along("both", 1, [1, 2]), 0.5),
    (lm.elements("mask", mask), None),
    (lm.elements("outer", np.outer(mask[:, 0], mask[0])), None),
    (lm.rows("schedule", 2), lambda step: 0.5),
    (lm.rows("value", 2), jnp.float32(0.5)),
]
names = ("columns", "rows", "both", "mask", "outer", "schedule", "value")
host = {name: np.arange(1.0, 1025.0, dtype=np.float32).reshape(16, 64) for name in names}
tx = lm.scale_by_rules(rules)
expected, _ = jax.jit(tx.update)(host, tx.init(host))
for kind in (AxisType.Auto, AxisType.Explicit):
    for spec in (P("x", None), P(None, "x")):
        mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
        sharding = NamedSharding(mesh, spec)
        with jax.set_mesh(mesh):
            grads = jax.device_put(host, sharding)
            state = tx.init(grads)
            assert state.rules_masks[0].shape == (16, 8)
            made = state  # its bits are on every device
            state = state._replace(rules_masks=jax.device_put(state.rules_masks, sharding))
            for update, before in itertools.product((tx.update, jax.jit(tx.update)), (made, state)):
                out, _ = update(grads, before)
                for name, leaf in out.items():
                    assert leaf.sharding.is_equivalent_to(sharding, 2), (kind, spec, name)
                    np.testing.assert_array_equal(leaf, expected[name])
            chain = optax.chain(optax.adamw(0.1), tx)
            def step(params, state):
                updates, state = chain.update(params, state, params)
                return optax.apply_updates(params, updates), state
            lowered = jax.jit(step).lower(grads, (optax.adamw(0.1).init(grads), state))
            text = lowered.compile().as_text()
            for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
                assert collective not in text, (kind, spec, collective)
print("sharded as before")
"""


def test_parts_are_sharded_as_their_arrays_and_add_no_collective():
    assert printed_on_four_devices(SHARDED) == "sharded as before\n"
