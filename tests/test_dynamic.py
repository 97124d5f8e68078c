"""Multipliers that change: schedules, and values that are known at run time only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrmult as lm
from tests.versions import enable_x64

PARAMS = {"head": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "trunk": jnp.full(4, -0.0)}
GRADS = jax.tree.map(lambda p: jnp.arange(1.0, p.size + 1).reshape(p.shape), PARAMS)


# ---- schedules ----------------------------------------------------------------------------------

SCHEDULES = {
    "cosine": optax.cosine_decay_schedule(2.0, 900),
    "warmup": optax.linear_schedule(0.0, 3.0, 10),
    "piecewise": optax.piecewise_constant_schedule(1.0, {1: 0.5, 10: 0.0}),
    "a function": lambda step: 0.5 * (step > 0) - 0.25,
    "a float": lambda step: 0.3,
    "an int": lambda step: step,
}


def updates_at(tx, step, jitted=True):
    state = tx.init(PARAMS)._replace(rules_step=jnp.int32(step))
    return (jax.jit(tx.update) if jitted else tx.update)(GRADS, state)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_values_are_the_schedules_own(name, jitted):
    schedule = SCHEDULES[name]
    tx = lm.scale_by_rules([("head", schedule), ("trunk", None)])
    for step in (0, 1, 10, 1000):
        updates, state = updates_at(tx, step, jitted)
        assert int(state.rules_step) == step + 1
        value = float(schedule(step))
        for update, grad in zip(
            jax.tree.leaves(updates["head"]), jax.tree.leaves(GRADS["head"]), strict=True
        ):
            np.testing.assert_allclose(update, value * grad, rtol=1e-6)
            assert value != 0 or np.signbit(update).all()


def test_the_step_goes_on():
    tx = optax.chain(optax.sgd(1.0), lm.scale_by_rules([("head", lambda step: 1.0 + step)]))
    state = tx.init(PARAMS)
    for step in range(4):
        updates, state = tx.update(GRADS, state, PARAMS)
        np.testing.assert_allclose(updates["head"]["b"], -(1.0 + step) * GRADS["head"]["b"])
        np.testing.assert_allclose(updates["trunk"], -GRADS["trunk"])


def test_a_schedule_at_zero_freezes():
    thaw = optax.piecewise_constant_schedule(0.0, {2: 1.0})
    tx = lm.scale_by_rules([("head", lambda step: jnp.where(step < 2, 0.0, 1.0)), ("trunk", thaw)])
    grads = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    state = tx.init(PARAMS)
    for step in range(3):
        updates, state = jax.jit(tx.update)(grads, state)
        head, trunk = updates["head"]["b"], updates["trunk"]
        assert np.signbit(trunk).all()
        assert (trunk == 0).all()
        assert np.isnan(head).all() if step == 2 else (np.signbit(head).all() and (head == 0).all())


def test_a_schedule_is_asked_once_per_step():
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.5

    rules = [("head/w", schedule), ("head/b", schedule), ("trunk", lambda step: 1.0)]
    tx = lm.scale_by_rules(rules)
    state = tx.init(PARAMS)
    assert asked == []
    tx.update(GRADS, state)
    assert len(asked) == 1


def test_schedules_below_wrappers():
    rules = [("head", lambda step: 1.0 + step), ("trunk", None)]
    inner = optax.chain(optax.sgd(1.0), lm.scale_by_rules(rules))
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    state = tx.init(PARAMS)
    seen = []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        seen.append(float(updates["head"]["b"][0]))
    assert seen == [0, -1, 0, -2]  # real steps are counted, not small ones
    masked = optax.masked(lm.scale_by_rules(rules), {"head": True, "trunk": False})
    updates, _ = masked.update(GRADS, masked.init(PARAMS))
    np.testing.assert_array_equal(updates["trunk"], GRADS["trunk"])


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (lambda step: jnp.ones(3), r"schedule .*gave an array float32\[3\]"),
        (lambda step: True, "gave"),
        (lambda step: 1j, "gave"),
        (lambda step: None, "gave None"),
        (lambda step: "x", "gave 'x'"),
        (optax.constant_schedule, r"rule 0 \('head' -> schedule constant_schedule\)"),
    ],
)
def test_a_schedule_that_gives_no_number(schedule, says):
    tx = lm.scale_by_rules([("head", schedule)])
    with pytest.raises(lm.MultiplierError, match=says):
        tx.update(GRADS, tx.init(PARAMS))


# ---- run-time values ----------------------------------------------------------------------------


def test_sweeping_multipliers_with_vmap():
    def step(head, trunk):
        tx = optax.chain(optax.adam(0.1), lm.scale_by_rules([("head", head), ("trunk", trunk)]))
        return tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]

    rates = jnp.array([0.0, 0.5, -2.0])
    swept = jax.jit(jax.vmap(step))(rates, rates[::-1])
    for i in range(3):
        rules = [("head", float(rates[i]) or 1e-30), ("trunk", float(rates[2 - i]) or 1e-30)]
        tx = optax.chain(optax.adam(0.1), lm.scale_by_rules(rules))
        expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-30),
            swept,
            expected,
        )


def test_values_set_through_inject_hyperparams():
    @optax.inject_hyperparams
    def make(rate, head):
        return optax.chain(optax.sgd(rate), lm.scale_by_rules([("head", head), ("trunk", None)]))

    tx = make(rate=0.1, head=3.0)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for head in (3.0, 0.5, 0.0):
        state.hyperparams["head"] = jnp.float32(head)
        for run in (update, tx.update):
            updates, _ = run(GRADS, state, PARAMS)
            np.testing.assert_allclose(
                updates["head"]["b"], -0.1 * head * GRADS["head"]["b"], rtol=1e-6
            )
            assert np.signbit(updates["trunk"]).all()
    assert update._cache_size() == 1


def test_a_value_does_not_make_another_plan():
    from lrmult._plan import _plan_of

    params = {"head": jnp.ones(17)}  # a size of its own
    before = _plan_of.cache_info().misses
    for value in (0.1, 0.2, 0.3):
        rules = [("head", jnp.float32(value)), (..., optax.constant_schedule(value))]
        tx = lm.scale_by_rules(rules)
        updates, _ = tx.update(params, tx.init(params))
        np.testing.assert_allclose(updates["head"], value, rtol=1e-6)
    assert _plan_of.cache_info().misses == before + 1


def test_a_value_of_zero_multiplies():
    tx = lm.scale_by_rules([("head", jnp.float32(0)), ("trunk", jnp.int32(2))])
    grads = GRADS | {"head": jax.tree.map(lambda g: g * jnp.nan, GRADS["head"])}
    updates, state = tx.update(grads, tx.init(PARAMS))
    assert np.isnan(updates["head"]["w"]).all()
    np.testing.assert_array_equal(updates["trunk"], 2 * GRADS["trunk"])
    assert state == optax.EmptyState()


@pytest.mark.parametrize("optimizer", [optax.adam, optax.sgd, optax.adamw])
def test_the_derivative_with_respect_to_multipliers(optimizer):
    """The loss after three steps, against finite differences."""
    with enable_x64(True):
        rng = np.random.default_rng(0)
        params = {
            "fc": {"kernel": jnp.asarray(rng.normal(size=(4, 6)))},
            "out": {"kernel": jnp.asarray(rng.normal(size=(6, 1)))},
        }
        train, valid = (jnp.asarray(rng.normal(size=(2, 8, 4))) for _ in range(2))

        def loss(params, data):
            hidden = jnp.tanh(data[0] @ params["fc"]["kernel"])
            return jnp.mean((hidden @ params["out"]["kernel"] - data[1][:, :1]) ** 2)

        def after_three_steps(rates):
            rules = [(lm.neurons("fc", [0, 1]), None), ("fc", rates[0]), ("out", rates[1])]
            tx = optax.chain(optimizer(0.1), lm.scale_by_rules(rules))
            new, state = params, tx.init(params)
            for _ in range(3):
                updates, state = tx.update(jax.grad(loss)(new, train), state, new)
                new = optax.apply_updates(new, updates)
            return loss(new, valid)

        rates = jnp.array([0.7, 1.3])
        gradient = jax.jit(jax.grad(after_three_steps))(rates)
        for i in range(2):
            above, below = (after_three_steps(rates.at[i].add(h)) for h in (1e-5, -1e-5))
            np.testing.assert_allclose(gradient[i], (above - below) / 2e-5, rtol=1e-5)
        at_zero = jax.grad(after_three_steps)(jnp.zeros(2))
        assert (at_zero != 0).all()


def test_a_frozen_nan_does_not_reach_the_derivative():
    grads = {"w": jnp.array([[1.0, jnp.nan], [2.0, jnp.nan]])}

    def total(rate):
        tx = lm.scale_by_rules([(lm.along("w", 1, 1), None), ("w", rate)])
        return tx.update(grads, tx.init(grads))[0]["w"].sum()

    assert jax.grad(total)(0.5) == jax.jit(jax.grad(total))(0.5) == 3
    assert jax.grad(lambda rate: total(lambda step: rate * (step + 1)))(0.5) == 3


def test_one_number_for_everything_may_be_an_array():
    tx = lm.scale_by_rules(jnp.float32(2))
    np.testing.assert_array_equal(tx.update(GRADS, tx.init(PARAMS))[0]["trunk"], 2 * GRADS["trunk"])


# ---- plans and messages -------------------------------------------------------------------------


def test_plans_show_what_changes():
    def slowly(step):
        return 0.1

    plan = lm.compile_rules([("head", slowly), ("trunk", jnp.float32(2))], PARAMS)
    text = str(plan)
    assert "schedule test_plans_show_what_changes.slowly" in text
    assert "run-time float32[]" in text
    assert plan.trainable == {"head": {"w": True, "b": True}, "trunk": True}
    assert plan.frozen == {"head": {"w": False, "b": False}, "trunk": False}
    [(region, value)] = plan.multipliers["head"]["w"].pairs
    assert (region.is_whole, value) == (True, slowly)
    np.testing.assert_allclose(plan.multipliers["head"]["b"].dense(0), np.full(3, 0.1))
    np.testing.assert_array_equal(plan.multipliers["trunk"].dense(), np.full(4, 2.0))


def test_messages_name_what_changes():
    def slowly(step):
        return 0.1

    for use in (lm.compile_rules, lambda rules, params: lm.scale_by_rules(rules).init(params)):
        with pytest.raises(lm.UnmatchedRuleError, match=r"'hed' -> schedule .*slowly\).*'head'"):
            use([("hed", slowly)], PARAMS)


@pytest.mark.parametrize(
    "value",
    [jnp.ones(2), jnp.ones((1, 1)), jnp.complex64(1), jnp.array(True), jax.random.key(0)],
)
def test_arrays_that_are_no_multiplier(value):
    with pytest.raises(lm.MultiplierError, match="one real number"):
        lm.Rules([("head", value)])


def test_functions_that_are_no_schedule():
    for function in (lambda path, leaf: 1, lambda: 1, lambda *, step: 1):
        with pytest.raises(lm.MultiplierError, match="step -> multiplier"):
            lm.Rules([("head", function)])


def test_one_rule_with_an_array_is_no_list():
    for rule in (("head", jnp.float32(1)), ("head", lambda step: 1), (lm.rows("w", 0), None)):
        with pytest.raises(lm.RuleError, match="is one rule, not a list"):
            lm.Rules(rule)


RULES = {
    "rows": [(lm.rows("w", 0), None)],
    "value": [("w", jnp.float32(0.5))],
    "mask": [(lm.elements("w", np.eye(3, 2) > 0), None)],
    "schedule": [("w", lambda step: 0.5)],
}


@pytest.mark.parametrize("rules", RULES)
def test_updates_from_numpy(rules):
    tx = lm.scale_by_rules(RULES[rules])
    updates = {"w": np.ones((3, 2))}
    state = tx.init(updates)
    out, _ = tx.update(updates, state)
    assert out["w"].dtype == np.float64
    traced = jax.jit(lambda state: tx.update(updates, state)[0])(state)
    np.testing.assert_array_equal(traced["w"], out["w"])
    halves = jax.vmap(lambda rate: lm.scale_by_rules([("w", rate)]).update(updates, ())[0]["w"])
    np.testing.assert_array_equal(halves(jnp.array([0.5, 2]))[:, 0, 0], [0.5, 2])


@pytest.mark.parametrize(
    "made", [[("a", lambda step: 0.5)], [(lm.elements("a", np.eye(2) > 0), None)]]
)
def test_a_state_that_shows_other_rules_is_refused(made):
    """Of rules with a schedule or a mask, by rules that have neither."""
    params = {"a": jnp.ones((2, 2))}
    for rules_of in (lm.scale_by_rules, lambda rules: lm.wrap(optax.sgd(0.1), rules)):
        state = rules_of(made).init(params)
        with pytest.raises(lm.RuleError, match="neither schedules nor element masks"):
            rules_of([("a", 2)]).update(params, state, params)
