"""`Plan`: its trees, its records and its table."""

import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import lrmult as lm


def block(width=4):
    def dense():
        return {"kernel": jnp.ones((width, width)), "bias": jnp.ones(width)}

    return {
        "attn": {name: dense() for name in ("query", "key", "value", "out")},
        "mlp": {"fc1": dense(), "fc2": dense()},
        "norm": {"scale": jnp.ones(width), "bias": jnp.ones(width)},
    }


def model(blocks=12):
    return {
        "embed": jnp.ones((10, 4)),
        "encoder": {f"block_{i}": block() for i in range(blocks)},
        "head": {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.ones(3)},
    }


RULES = [("encoder/block[:4]", None), ("**/bias", 0.5), ("head", 10), ("embed", -1)]


def test_the_trees_of_a_plan():
    params = {"a": jnp.ones(2), "b": [jnp.ones(1), None], "c": print, "i": jnp.array([1])}
    plan = lm.compile_rules([("a", None), ("b", 2)], params)
    assert plan.multipliers == {"a": 0.0, "b": [2.0, None], "c": 1.0, "i": 1.0}
    assert plan.frozen == {"a": True, "b": [False, None], "c": False, "i": False}
    assert plan.trainable == {"a": False, "b": [True, None], "c": False, "i": True}
    for tree in (plan.multipliers, plan.frozen, plan.trainable):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert {type(leaf) for leaf in jax.tree.leaves(plan.multipliers)} == {float}
    assert {type(leaf) for leaf in jax.tree.leaves(plan.trainable)} == {bool}


def test_changing_a_tree_changes_no_plan():
    mask = lm.trainable_mask([("a", None)])
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    mask(params)["a"] = "changed"
    assert mask(params) == {"a": False, "b": True}


def test_the_records_of_a_plan():
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(4), "c": jnp.ones((0, 3))}
    first, second, third = lm.compile_rules([("b", None), ("a", 0.5), ("c", 2)], params).leaves
    assert (first.path, first.shape, first.dtype) == ("a", (2, 3), jnp.bfloat16)
    assert (first.multiplier, first.trained, first.frozen) == (0.5, 6, 0)
    [claim] = first.rules
    assert (claim.index, claim.text) == tuple(claim) == (1, "'a' -> 0.5")
    assert (second.multiplier, second.trained, second.frozen) == (0.0, 0, 4)
    assert (third.multiplier, third.trained, third.frozen) == (2.0, 0, 0)
    assert lm.compile_rules([], {"a": jnp.ones(())}).leaves[0].rules == ()


def test_the_table_is_as_it_was():
    golden = pathlib.Path(__file__).parent / "golden" / "table.txt"
    assert str(lm.compile_rules(RULES, model())) + "\n" == golden.read_text()


def test_the_table_adds_up():
    plan = lm.compile_rules(RULES, model())
    trained = sum(leaf.trained for leaf in plan.leaves)
    frozen = sum(leaf.frozen for leaf in plan.leaves)
    total = sum(leaf.size for leaf in jax.tree.leaves(model()))
    assert trained + frozen == total
    assert str(plan).endswith(
        f"{len(plan.leaves)} arrays, {total:,} parameters: {trained:,} train, {frozen:,} frozen"
    )


@pytest.mark.parametrize("cross_cutting", [False, True])
def test_the_table_of_a_thousand_leaves_fits_a_screen(cross_cutting):
    params = model(blocks=80)
    assert len(jax.tree.leaves(params)) > 1000
    rules = [("encoder/block[:40]", None), ("head", 10)]
    rules += [("**/bias", 2)] if cross_cutting else []
    lines = str(lm.compile_rules(rules, params)).splitlines()
    assert len(lines) < 30
    assert max(map(len, lines)) < 120


def test_every_row_of_a_table_is_a_rule():
    """The path of a row, used as a target, claims as many arrays as the row says."""
    params = model()
    plan = lm.compile_rules(RULES, params)
    rows = [line.split("  ")[0].strip() for line in str(plan).splitlines()[2:-2]]
    assert "encoder/block[0:4]" in rows
    claimed = [
        sum(leaf.rules != () for leaf in lm.compile_rules([(row, 2)], params).leaves)
        for row in rows
    ]
    assert sum(claimed) == len(plan.leaves)


def test_the_table_names_rules_that_claim_nothing():
    plan = lm.compile_rules(lm.optional([("absent", 2)]) + [("head", 3)], model())
    assert "rule 0 ('absent' -> 2) claims nothing here" in str(plan)
    assert "rule 1" not in str(plan)


def test_tables_of_small_trees():
    assert "f32[3]" in str(lm.compile_rules(0.5, jnp.ones(3)))
    assert "0 arrays, 0 parameters" in str(lm.compile_rules([], {}))
    assert "1 array, 1 parameters" in str(lm.compile_rules([], {"a": 1.0}))


def test_rich_prints_the_table():
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(lm.compile_rules(RULES, model()))
    console.file.close()
    assert "encoder/block[0:4]" in console.export_text()


def test_the_repr_is_short():
    plan = lm.compile_rules(RULES, model())
    assert repr(plan) == "<lrmult.Plan of 4 rules for 171 arrays; print it for a table>"


def test_deep_trees():
    params = leaf = {}
    for _ in range(900):
        leaf["x"] = {}
        leaf = leaf["x"]
    leaf["w"] = jnp.ones(1)
    plan = lm.compile_rules([("**/w", 2)], params)
    assert plan.leaves[0].multiplier == 2
    assert "1 array" in str(plan)


def test_holes_forgive_only_what_could_be_in_them():
    params = {"a": {"x": jnp.ones(1), "y": optax.MaskedNode()}, "b": None}
    for rules in ([("a/y", 1)], [("a/y/z", 1)], [("b/c/d", 1)], [("a/x", 1), ("a", 2)]):
        lm.compile_rules(rules, params)
    for rules in ([("a/z", 1)], [("c", 1)], [("a/x/y", 1)]):
        with pytest.raises(lm.UnmatchedRuleError):
            lm.compile_rules(rules, params)
    with pytest.raises(lm.ShadowedRuleError):
        lm.compile_rules([("a/x", 1), ("*/x", 2), ("b", 1)], params | {"b": jnp.ones(1)})


def test_a_none_in_a_module_forgives_no_typo():
    keys = jax.random.split(jax.random.key(0))
    params = {"layers": [eqx.nn.Linear(2, 2, use_bias=False, key=key) for key in keys]}
    for rules in (
        [("**/weigth", 1)],
        [("layers/**/weigth", 1)],
        [("layers/*/weigth", 1)],
        [(re.compile(".*/weigth"), 1)],
    ):
        with pytest.raises(lm.UnmatchedRuleError):
            lm.compile_rules(rules, params)
    with pytest.raises(lm.ShadowedRuleError):
        lm.compile_rules([(..., None), ("**/weight", 2)], params)
    for rules in ([("**/bias", 1)], [(re.compile(".*/bias"), 1)], [("layers/*/bias", 1)]):
        lm.compile_rules(rules, params)  # could be there in a bigger tree
    for hole in (optax.MaskedNode(), None):  # here a whole subtree may be missing
        lm.compile_rules([("**/weigth", 1)], {"layers": hole, "b": jnp.ones(1)})


def test_predicates_see_the_path_as_it_is_listed():
    params = {"gain*": jnp.ones(1), "b": jnp.ones(2)}
    plan = lm.compile_rules(
        [(lambda path, leaf: path == "gain\\*" and leaf.shape == (1,), 2)], params
    )
    assert plan.multipliers == {"gain*": 2.0, "b": 1.0}
    asked = []
    lm.compile_rules([(lambda path, leaf: not asked.append(path), 2)], params)
    assert asked == lm.paths(params)


def test_none_counts_as_a_child():
    params = {"layers": [None, jnp.ones(1), None]}
    plan = lm.compile_rules([("layers[1]", 2), ("layers[-1]", 3)], params)
    assert plan.multipliers == {"layers": [None, 2.0, None]}


def test_haiku_families_below_masks():
    params = {"linear": optax.MaskedNode(), "linear_1": {"w": jnp.ones(1)}}
    plan = lm.compile_rules([("linear[1]", 2), ("linear[0]", 3)], params)
    assert plan.multipliers["linear_1"] == {"w": 2.0}
