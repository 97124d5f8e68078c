"""Every optimizer of optax under rules: what docs/optimizers.md says, by running it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrmult as lm
from tests import conformance
from tests.conformance import BUILDING_BLOCKS, FROZEN, PARAMS, RATES, ROWS, Row

PAGE = conformance.read_page()


def exported(row: Row) -> bool:
    return row.export in conformance.exports()


@pytest.mark.parametrize("name", ROWS)
def test_the_page_says_what_a_fresh_run_says(name):
    row = ROWS[name]
    if not exported(row):
        pytest.skip(f"optax {optax.__version__} has no {row.export}")
    found = conformance.run(row)
    assert dict(zip(conformance.HEADER[1:], found, strict=False)) == dict(
        zip(conformance.HEADER[1:], PAGE[conformance.shown(row)], strict=False)
    )


def test_the_page_has_every_row_and_no_other():
    assert set(PAGE) == {conformance.shown(row) for row in ROWS.values()}


def test_every_optimizer_that_optax_exports_has_a_row():
    shown = {row.export for row in ROWS.values()}
    assert not shown & BUILDING_BLOCKS
    unknown = conformance.exports() - shown - BUILDING_BLOCKS
    assert not unknown, (
        f"optax {optax.__version__} exports what tests/conformance.py does not know: give each of "
        f"{sorted(unknown)} a row there, or list it among BUILDING_BLOCKS"
    )


def test_exports_are_told_from_everything_else():
    exports = conformance.exports()
    assert {"adamw", "chain", "MultiSteps", "contrib.dog", "contrib.sam"} <= exports
    assert not {"apply_updates", "cosine_decay_schedule", "GradientTransformation"} & exports


# What stands at the top of the page, and in its notes ----------------------------------------


def test_the_summary_of_the_page():
    for row in ROWS.values():
        rate, frozen, part, apart, *_ = cells = PAGE[conformance.shown(row)]
        if "inside" not in row.notes:
            assert (frozen, part) == ("yes", "yes")
        if apart == "no":
            assert cells[4:] == ["yes"] * 4
        if cells != ["yes"] * 8:
            assert row.notes
        if rate == "no":
            notes = "rate estimate rprop optimism adafactor lbfgs lookahead sam free"
            assert set(notes.split()) & set(row.notes)


def test_value_and_grad_from_state_is_of_no_use_under_wrap():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = lm.wrap(optax.lbfgs(memory_size=1), [("a", None)])
    value_and_grad = optax.value_and_grad_from_state(lambda p: jnp.sum(p["a"] * p["b"]))
    with pytest.raises(TypeError, match="MaskedNode"):
        value_and_grad(params, state=tx.init(params))


def schedule_free_eval(chain):
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = chain.init(params)
    for grads in conformance.GRADS:
        updates, state = chain.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    free = next(s for s in state if isinstance(s, optax.contrib.ScheduleFreeState))
    return optax.contrib.schedule_free_eval_params(free, params)


def test_evaluation_parameters_of_schedule_free():
    freeze, rules = lm.scale_by_rules(FROZEN), lm.scale_by_rules(FROZEN + RATES)
    inside = optax.chain(optax.sgd(0.05), rules)
    advised = optax.chain(optax.contrib.schedule_free(inside, 0.05), freeze)
    after = optax.chain(optax.contrib.schedule_free(optax.sgd(0.05), 0.05), rules)
    kept, moved = schedule_free_eval(advised), schedule_free_eval(after)
    for part in (("frozen", slice(None)), ("part", slice(0, 2))):
        name, rows = part
        np.testing.assert_allclose(kept[name][rows], PARAMS[name][rows], rtol=1e-6)
        assert np.abs(moved[name][rows] - PARAMS[name][rows]).max() > 1e-3
    wrapped = lm.wrap(optax.contrib.schedule_free(optax.sgd(0.05), 0.05), FROZEN + RATES)
    state = wrapped.init(PARAMS)
    with pytest.raises(TypeError):
        optax.contrib.schedule_free_eval_params(state.inner_state, PARAMS)
