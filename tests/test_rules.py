"""`Rules`: what they accept, how they combine, how they print."""

import fractions
import re

import jax.numpy as jnp
import numpy as np
import pytest

import lrmult as lm

PARAMS = {"a": {"w": jnp.ones(2), "b": jnp.ones(1)}, "c": jnp.ones(3)}


def multipliers(rules, **options):
    return [leaf.multiplier for leaf in lm.compile_rules(rules, PARAMS, **options).leaves]


@pytest.mark.parametrize(
    "rules",
    [
        [("a", 2), (..., 0.5)],
        (("a", 2), (..., 0.5)),
        [["a", 2], [..., 0.5]],
        {"a": 2, ...: 0.5},
        lm.Rules([("a", 2), (..., 0.5)]),
        [lm.Rule("a", 2), lm.Rule(..., 0.5)],
        ((target, multiplier) for target, multiplier in [("a", 2), ("**", 0.5)]),
        lm.Rules([("a", 2)]) + 0.5,
        [("a", 2)] + lm.Rules(0.5),
        {("a",): np.float64(2), (...,): fractions.Fraction(1, 2)},
        [(re.compile("a/."), np.int32(2)), (lambda path, leaf: True, np.array(0.5))],
    ],
)
def test_everything_that_rules_may_be(rules):
    assert multipliers(rules) == [2, 2, 0.5]


def test_one_number_is_for_everything():
    assert multipliers(0.1) == [0.1] * 3
    assert multipliers(0) == [0] * 3
    assert multipliers([]) == [1] * 3
    assert multipliers(-2) == [-2] * 3


@pytest.mark.parametrize("zero", [None, 0, 0.0, -0.0, np.float32(0), False + 0])
def test_every_zero_is_frozen(zero):
    rule = lm.Rule("a", zero)
    assert rule.multiplier is None
    assert lm.Rules([("a", zero)]) == lm.Rules([("a", None)])


def test_the_first_rule_of_a_sum_wins():
    override, base = lm.Rules([("a/w", 5)]), lm.Rules([("a", 2), ("c", 3)])
    assert multipliers(override + base) == [2, 5, 3]
    with pytest.raises(lm.ShadowedRuleError, match=r"rule 2 \('a/w' -> 5\)"):
        multipliers(base + override)


def test_rules_are_a_sequence():
    rules = lm.Rules([("a", 2), ("c", None), (..., 1)])
    assert len(rules) == 3
    assert rules[1] == lm.Rule("c", 0)
    assert rules[1:] == lm.Rules([("c", None), (..., 1)])
    assert [tuple(rule) for rule in rules] == [("a", 2.0), ("c", None), (..., 1.0)]
    assert rules.index(lm.Rule("c", None)) == 1
    assert hash(rules) == hash(lm.Rules(rules))
    assert rules != [("a", 2)]
    with pytest.raises(AttributeError):
        rules[0].multiplier = 3


@pytest.mark.parametrize(
    "rules",
    [
        lm.Rules([("a", 2), ("**/b", None), (..., -0.5)]),
        lm.Rules([(("a", 2, slice(0, 4), ...), 1), (-1, 2), (slice(None, None, 2), 3)]),
        lm.Rules([(re.compile("x/.*"), 1)]),
        lm.Rules([]),
        lm.Rules([("a", 1)]) + lm.optional([("b", 2)]),
    ],
)
def test_the_repr_is_source(rules):
    names = {"Rules": lm.Rules, "optional": lm.optional, "re": re}
    assert eval(repr(rules), names) == rules


def test_rules_are_equal_if_they_are_written_alike():
    assert lm.Rule(("a", slice(2)), 1) == lm.Rule(("a", slice(2)), 1.0)
    assert lm.Rule("a", None) == lm.Rule("a", 0)
    assert lm.Rule(..., 1) != lm.Rule("**", 1)  # messages show what was written
    assert lm.Rule("a{b,c}", 1) != lm.Rule("a", 1)
    assert lm.Rule("a", 2) != lm.Rule("a", 1)
    assert lm.Rule("a", 1) != lm.Rule("a", 1, optional=True)


def test_optional_rules_may_claim_nothing():
    defaults = lm.optional([("absent", 3), ("a", 7), ("**/layers[9]", 1)])
    assert multipliers([("a", 2)] + defaults) == [2, 2, 1]
    assert multipliers([("a", 2), (..., 0.5)] + defaults) == [2, 2, 0.5]
    assert multipliers([("a", 2), ("c", 1), (..., 0.5)] + defaults) == [2, 2, 1]
    with pytest.raises(lm.PositionError):
        multipliers(lm.optional([("a[0]", 3)]))
    with pytest.raises(lm.PatternError):
        lm.optional([("a[", 3)])


def test_a_closing_catch_all_may_find_nothing_left():
    assert multipliers([("a", 2), ("c", 3), (..., 1)]) == [2, 2, 3]
    assert multipliers([("a", 2), ("c", 3), ("**", 1)]) == [2, 2, 3]
    with pytest.raises(lm.ShadowedRuleError):
        multipliers([("a", 2), ("c", 3), (..., 1), ("*", 4)])


def test_not_strict_warns():
    with pytest.warns(UserWarning, match=r"rule 0 \('hed' -> 2\): no path matches"):
        assert multipliers([("hed", 2), ("a", 3)], strict=False) == [3, 3, 1]
    with pytest.warns(UserWarning, match="it can never apply"):
        assert multipliers([("a", 3), ("a/w", 2)], strict=False) == [3, 3, 1]
    with pytest.raises(lm.PositionError):
        multipliers([("a[0]", 3)], strict=False)
