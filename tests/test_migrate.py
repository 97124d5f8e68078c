"""States carried over to other rules in mid-run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrmult as lm
from lrmult._paths import entries
from tests.test_constants import LARGEST_CONSTANT, constants, spec
from tests.test_wrap import bytes_of, gradients, is_cut, run, tree_of

PARAMS = {"trunk": tree_of((6, 5), (5,)), "head": tree_of((5, 4), (4,), (4, 4))}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9),
    "adan": optax.adan(0.1),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(0.1),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "schedule": optax.adam(optax.linear_schedule(0.1, 0.0, 30)),
}
# Old rules, new rules, and rules under which trains just what trains under both: two arrays at
# least, since XLA itself rounds the steps of plain adam otherwise where there is only one.
WHOLE = {
    "thaw": ([("trunk", None)], [], [("trunk", None)]),
    "freeze": (
        [],
        [("trunk/w1", None), ("head/w1", None)],
        [("trunk/w1", None), ("head/w1", None)],
    ),
    "both": ([("trunk", None)], [("head/w0", None)], [("trunk", None), ("head/w0", None)]),
}
PARTS = {
    "thaw": ([(lm.rows("head/w0", [0, 2]), None)], [], [(lm.rows("head/w0", [0, 2]), None)]),
    "freeze": ([], [(lm.along("head/w0", 1, 0), None)], [(lm.along("head/w0", 1, 0), None)]),
    "axes": (
        [(lm.rows("head/w0", [0, 2]), None), ("trunk/w0", None)],
        [(lm.along("head/w0", 1, [1]), None), (lm.rows("trunk/w0", [0]), None)],
        [
            (lm.rows("head/w0", [0, 2]), None),
            (lm.along("head/w0", 1, [1]), None),
            ("trunk/w0", None),
        ],
    ),
    "mask": (
        [(lm.elements("head/w0", np.eye(5, 4) > 0), None)],
        [(lm.rows("head/w0", 0), None)],
        [(lm.elements("head/w0", np.eye(5, 4) > 0), None), (lm.rows("head/w0", 0), None)],
    ),
    "nothing in common": (
        [(lm.rows("head/w0", 0), None)],
        [(lm.rows("head/w0", slice(1, None)), None)],
        [("head/w0", None)],
    ),
}
BEFORE, AFTER = range(4), range(4, 24)


def trained(rules, params):
    """What trains of each array, flat."""
    plan = lm.compile_rules(rules, params)
    for leaf, frozen in zip(*map(jax.tree.leaves, (params, plan.frozen)), strict=True):
        frozen = frozen.dense() if isinstance(frozen, lm.Parts) else frozen
        yield np.asarray(leaf)[~np.broadcast_to(frozen, leaf.shape)]


def check(optimizer, case, compact, jit, start=PARAMS, after=AFTER):
    old, new, common = case
    txs = [lm.wrap(optimizer, rules, compact=compact) for rules in case]
    params, state = run(txs[0], start, BEFORE, jit=jit)
    state = lm.migrate(state, params, optimizer, old, new, compact=compact)
    fresh = txs[1].init(params)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    for got, like in zip(*map(jax.tree.leaves, (state, fresh)), strict=True):
        assert isinstance(got, jax.Array)
        assert (got.shape, got.dtype) == (like.shape, like.dtype)
    params, _ = run(txs[1], params, after, jit=jit, state=state)
    alone, _ = run(txs[2], start, [*BEFORE, *after], jit=jit)
    for a, b in zip(trained(common, params), trained(common, alone), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_goes_on_training_goes_on_as_if_alone(name, case):
    check(OPTIMIZERS[name], WHOLE[case], compact=False, jit=True)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("case", PARTS)
def test_so_do_parts_of_arrays(case, compact):
    # Eagerly: in a compiled step XLA may round a product and a sum once or twice.
    check(OPTIMIZERS["adam"], PARTS[case], compact, jit=False)


def moments(state, path):
    node = optax.tree.get(state, "mu")
    for name in path.split("/"):
        node = node[name]
    return node


@pytest.mark.parametrize("compact", [False, True])
def test_what_is_thawed_starts_afresh_and_counters_go_on(compact):
    old, new = [("trunk", None), (lm.rows("head/w0", [0, 2]), None)], [("head/w1", None)]
    adam = optax.adam(0.1)
    params, state = run(lm.wrap(adam, old, compact=compact), PARAMS, BEFORE)
    was = optax.tree.get(state, "mu")
    state = lm.migrate(state, params, adam, old, new, compact=compact)
    assert optax.tree.get(state, "count") == 4
    assert not moments(state, "trunk/w0").any()
    assert is_cut(moments(state, "head/w1"))
    head = moments(state, "head/w0")
    assert not head[np.array([0, 2])].any()
    kept = was["head"]["w0"] if compact else was["head"]["w0"][np.array([1, 3, 4])]
    assert head[np.array([1, 3, 4])].tobytes() == kept.tobytes()
    assert bytes_of(state) == bytes_of(lm.wrap(adam, new, compact=compact).init(params))


def test_there_and_back_loses_what_was_frozen_between():
    adam = optax.adam(0.1)
    rows = [(lm.rows("head/w0", 1), None)]
    params, state = run(lm.wrap(adam, []), PARAMS, BEFORE)
    frozen = lm.migrate(state, params, adam, [], rows)
    back = lm.migrate(frozen, params, adam, rows, [])
    before, after = moments(state, "head/w0"), moments(back, "head/w0")
    np.testing.assert_array_equal(after, before.at[1].set(0.0))
    same = lm.migrate(state, params, adam, [], [])
    for a, b in zip(*map(jax.tree.leaves, (state, same)), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", ["adafactor", "sm3", "muon", "lbfgs", "lookahead"])
def test_other_optimizers_go_on(name):
    optimizer = {
        "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
        "sm3": optax.sm3(0.1),
        "muon": optax.contrib.muon(0.1),
        "lbfgs": optax.lbfgs(linesearch=None),
        "lookahead": optax.contrib.schedule_free_adamw(0.1),
    }[name]
    old, new, _ = PARTS["axes"]
    for compact in (False, True):
        params, state = run(lm.wrap(optimizer, old, compact=compact), PARAMS, BEFORE, jit=False)
        state = lm.migrate(state, params, optimizer, old, new, compact=compact)
        tx = lm.wrap(optimizer, new, compact=compact)
        after, _ = run(tx, params, range(2), jit=False, state=state)
        lm.assert_frozen(params, after, new)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
        # What trains as a whole before and after keeps all that there was.
        tx = lm.wrap(optimizer, old, compact=compact)
        same = lm.migrate(state, params, optimizer, new, new, compact=compact)
        for a, b in zip(*map(jax.tree.leaves, (state, same)), strict=True):
            assert a.tobytes() == b.tobytes()


def test_the_history_of_lbfgs_is_carried_by_element():
    lbfgs = optax.lbfgs(linesearch=None)
    old, new, _ = PARTS["axes"]
    for compact in (False, True):
        params, state = run(lm.wrap(lbfgs, old, compact=compact), PARAMS, BEFORE, jit=False)
        history = optax.tree.get(state, "diff_updates_memory")["head"]["w0"]
        if not compact:
            history = history[:, [1, 3, 4]]
        assert history.any()
        state = lm.migrate(state, params, lbfgs, old, new, compact=compact)
        after = optax.tree.get(state, "diff_updates_memory")["head"]["w0"]
        if not compact:
            assert not after[:, :, 1].any()
            after = after[:, :, [0, 2, 3]]
        assert not after[:, [0, 2]].any()
        np.testing.assert_array_equal(after[:, [1, 3, 4]], history[:, :, [0, 2, 3]])


def test_the_step_of_schedules_goes_on():
    ramp = optax.linear_schedule(0.0, 1.0, 10)
    sgd, old = optax.sgd(1.0), [("trunk", None), ("head/w0", ramp)]
    params, state = run(lm.wrap(sgd, old), PARAMS, BEFORE)
    mask = np.eye(5, 4) > 0
    new = [("trunk", ramp), (lm.elements("head/w0", mask), None)]
    state = lm.migrate(state, params, sgd, old, new)
    assert state.rules_state.rules_step == 4
    assert [bits.shape for bits in state.rules_state.rules_masks] == [(5, 1)]
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = lm.wrap(sgd, new).update(ones, state, params)
    np.testing.assert_allclose(updates["trunk"]["w1"], -0.4)
    # Rules without schedules and masks count no steps.
    state = lm.migrate(state, params, sgd, new, [])
    assert state.rules_state == optax.EmptyState()
    assert lm.migrate(state, params, sgd, [], old).rules_state.rules_step == 0


def test_from_the_optimizer_itself():
    adam, rules = optax.adam(0.1), [("trunk", None), (lm.rows("head/w0", [0, 2]), None)]
    params, state = run(adam, PARAMS, BEFORE)
    for compact in (False, True):
        found = lm.migrate(state, params, adam, [], rules, compact=compact)
        wrapped = lm.wrap(adam, []).init(params)._replace(inner_state=state)
        expected = lm.migrate(wrapped, params, adam, [], rules, compact=compact)
        assert moments(found, "head/w1").any()
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert a.tobytes() == b.tobytes()


TREES = {
    "list": [jnp.ones(2), jnp.ones(2), jnp.ones(2)],
    "tuple": (jnp.ones(2), jnp.ones(2), jnp.ones(2)),
    "fields": {"count": jnp.ones(2), "mu": jnp.ones(2), "nu": jnp.ones(2)},
    "nested": [(jnp.ones(2), jnp.ones(2)), jnp.ones(2)],
}


@pytest.mark.parametrize("name", ["sgd", "adam", "MultiSteps"])
@pytest.mark.parametrize("tree", TREES)
def test_parameters_named_like_parts_of_a_state(tree, name):
    """Neither the places in a chain nor the fields of a state are taken for parameters."""
    params = TREES[tree]
    first, second, third = lm.paths(params)
    part = [(lm.rows(first, 0), None)]
    for case in (
        ([(first, None)], [], [(first, None)]),
        (part, [(second, None)], [*part, (second, None)]),
        ([(third, None)], part, [*part, (third, None)]),
    ):
        check(OPTIMIZERS[name], case, compact=False, jit=False, start=params, after=[4, 5])
    state = lm.wrap(OPTIMIZERS[name], [(first, None)]).init(params)
    with pytest.raises(lm.RuleError) as caught:
        lm.migrate(state, params, OPTIMIZERS[name], [(second, None)], [])
    message = str(caught.value)
    assert f"holds nothing for {first!r}," in message
    assert f"holds something for {second!r}," in message
    assert repr(third) not in message


@pytest.mark.parametrize("tree", TREES)
def test_so_for_optimizers_that_make_nothing_of_a_placeholder(tree):
    params, lbfgs = TREES[tree], optax.lbfgs(linesearch=None)
    first, second, third = lm.paths(params)
    _, state = run(lm.wrap(lbfgs, [(first, None)]), params, BEFORE, jit=False)
    found = lm.migrate(state, params, lbfgs, [(first, None)], [(second, None)])
    was, now = (entries(each.inner_state) for each in (state, found))
    for path, each in now.items():
        if path[-len(third.split("/")) :] == tuple(third.split("/")) and not is_cut(each):
            np.testing.assert_array_equal(each, was[path])


def test_plans_are_read_once_whatever_the_number_of_arrays(monkeypatch):
    reads = []
    frozen = lm.Plan.frozen.fget
    monkeypatch.setattr(lm.Plan, "frozen", property(lambda plan: reads.append(1) or frozen(plan)))
    params = {f"a{i}": jnp.ones(1) for i in range(20)}
    state = lm.wrap(optax.adam(0.1), []).init(params)
    lm.migrate(state, params, optax.adam(0.1), [], [("a0", None)])
    assert len(reads) == 2


def test_warnings_are_of_the_caller():
    adam = optax.adam(0.1)
    state = lm.wrap(adam, []).init(PARAMS)
    with pytest.warns(UserWarning, match="no path matches 'tail'") as caught:
        lm.migrate(state, PARAMS, adam, [("tail", 2)], [("tail", None)], strict=False)
    assert [each.filename for each in caught] == [__file__] * 2


def test_no_large_constant_in_a_jit():
    params = {"w": spec(4096, 1024)}
    old = [(lm.rows("w", [1, 5]), None), (lm.along("w", 1, [0, 7]), None)]
    adam = optax.adam(0.1)
    state = jax.eval_shape(lm.wrap(adam, old).init, params)
    lowered = jax.jit(lambda *args: lm.migrate(*args, adam, old, [])).lower(state, params)
    assert max(constants(lowered)) <= LARGEST_CONSTANT


def test_in_a_jit():
    adam, (old, new, _) = optax.adam(0.1), PARTS["axes"]
    params, state = run(lm.wrap(adam, old), PARAMS, BEFORE)
    expected = lm.migrate(state, params, adam, old, new)
    found = jax.jit(lambda state, params: lm.migrate(state, params, adam, old, new))(state, params)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_bare_array_and_an_empty_one():
    adam, first = optax.adam(0.1), [(lm.rows(..., 0), None)]
    for array in (jnp.arange(6.0).reshape(3, 2), jnp.arange(3.0), jnp.zeros((3, 0))):
        array, state = run(lm.wrap(adam, first), array, BEFORE)
        back = lm.migrate(state, array, adam, first, [])
        assert optax.tree.get(back, "count") == 4
        if array.size:
            np.testing.assert_array_equal(*(optax.tree.get(each, "mu") for each in (back, state)))


# --- mistakes ------------------------------------------------------------------------------------


def state_of(optimizer, rules, **kwargs):
    return lm.wrap(optimizer, rules, **kwargs).init(PARAMS)


def mistakes():
    adam, mask = optax.adam(0.1), np.eye(5, 4) > 0
    flat = optax.flatten(adam)
    trunk, head = [("trunk", None)], [("head", None)]
    bits = [(lm.elements("head/w0", mask), None)]
    others = [(lm.elements("head/w0", ~mask), None)]
    rows, more = ([(lm.rows("head/w0", slice(n)), None)] for n in (2, 3))
    return {
        "other arrays": (
            (state_of(adam, trunk), adam, head, []),
            "made for other rules, or another optimizer: it holds nothing for 'trunk/w0' and "
            "'trunk/w1', which these rules train; it holds something for 'head/w0', 'head/w1' and "
            "'head/w2', which these rules freeze; pass the rules that it was made with as "
            "old_rules",
        ),
        "other parts": (
            (state_of(adam, rows, compact=True), adam, more, [], {"compact": True}),
            "it holds an array float32[3,4] for 'head/w0', of which these rules train an array "
            "float32[2,4]",
        ),
        "compact forgotten": (
            (state_of(adam, rows, compact=True), adam, rows, []),
            "it holds an array float32[3,4] for 'head/w0', of which these rules train",
        ),
        "another optimizer": (
            (state_of(optax.sgd(0.1), trunk), adam, trunk, []),
            "it holds nothing for 'head/w0', 'head/w1' and 'head/w2', which these rules train",
        ),
        "no counter": (
            (state_of(optax.trace(0.9), trunk), optax.sgd(optax.constant_schedule(0.1)), trunk, []),
            "the state has nothing at '1/count': it was made by another optimizer",
        ),
        "not wrapped": (
            (adam.init(PARAMS), adam, trunk, []),
            "it holds something for 'trunk/w0' and 'trunk/w1', which these rules freeze",
        ),
        "within another": (
            ((state_of(adam, trunk), optax.EmptyState()), adam, trunk, []),
            "the state of lrmult.wrap is only a part of this state; migrate that part",
        ),
        "flat": (
            (state_of(flat, trunk), flat, trunk, []),
            "the optimizer keeps an array float32[40] at '0/mu', which is an array float32[75] "
            "under the new rules, and nothing tells which part is for which parameter",
        ),
        "other masks": ((state_of(adam, bits), adam, others, []), "other element masks"),
    }


@pytest.mark.parametrize("name", mistakes())
def test_mistakes(name):
    (state, optimizer, old, new, *kwargs), says = mistakes()[name]
    with pytest.raises(lm.LrmultError) as caught:
        lm.migrate(state, PARAMS, optimizer, old, new, **(kwargs[0] if kwargs else {}))
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500


def test_gradients_differ_at_each_step():
    """Or the tests above would prove little."""
    assert (gradients(PARAMS, 0)["head"]["w0"] != gradients(PARAMS, 1)["head"]["w0"]).all()
