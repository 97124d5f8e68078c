"""Recipes give the numbers of the code that they come from.

`golden/mup.json` and `golden/recipes.json` hold what that code gives for worked examples; the
script `golden/recipes.py` runs it and writes them anew.
"""

import json
import pathlib

import pytest

import lrmult as lm
from lrmult import recipes
from tests.trees import tree_of

GOLDEN = pathlib.Path(__file__).parent / "golden"
MUP = json.loads((GOLDEN / "mup.json").read_text())["examples"]
FASTAI, LORA_PLUS = json.loads((GOLDEN / "recipes.json").read_text())["systems"]


def got(rules, params):
    return {leaf.path: leaf.multiplier for leaf in lm.compile_rules(rules, params).leaves}


def mup_models(example):
    rows = example["parameters"]
    return tree_of({row[1]: row[3] for row in rows}), tree_of({row[1]: row[2] for row in rows})


@pytest.mark.parametrize("example", MUP, ids=["one width", "two widths"])
@pytest.mark.parametrize(("optimizer", "column"), [("adam", 4), ("sgd", 5)])
def test_mup(example, optimizer, column):
    params, base = mup_models(example)
    expected = {row[1]: row[column] for row in example["parameters"]}
    assert got(recipes.mup(params, base, optimizer), params) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("optimizer", "column"), [("adam", 8), ("sgd", 9)])
def test_mup_whose_outputs_are_not_divided(optimizer, column):
    params, base = mup_models(MUP[0])
    expected = {row[1]: row[column] for row in MUP[0]["parameters"]}
    rules = recipes.mup(params, base, optimizer, output="output/kernel")
    assert got(rules, params) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rates", "decays"), [(4, 6), (5, 7)], ids=["adam", "sgd"])
def test_mup_scales_decay_against_the_rate(rates, decays):
    params, base = mup_models(MUP[0])
    rules = recipes.mup(params, base, {4: "adam", 5: "sgd"}[rates])
    expected = {row[1]: row[decays] for row in MUP[0]["parameters"]}
    assert got([(target, 1 / rate) for target, rate in rules], params) == pytest.approx(expected)


@pytest.mark.parametrize(("lo", "hi", "rates"), FASTAI["rows"])
def test_discriminative(lo, hi, rates):
    groups = [f"group_{i}" for i in range(len(rates))]
    params = tree_of(dict.fromkeys(groups, (1,)))
    found = got(recipes.discriminative(params, lo, hi, groups), params)
    assert [found[group] for group in groups] == pytest.approx(rates, rel=1e-12)


def test_lora_plus():
    params = tree_of({path: shape for _, path, shape, _ in LORA_PLUS["rows"]})
    ratio, rate = LORA_PLUS["ratio"], LORA_PLUS["rate"]
    expected = {path: (given or 0) / rate for _, path, _, given in LORA_PLUS["rows"]}
    # Two of its conventions are left to the caller: what it does with other vectors that train, and
    # adapters of embeddings, whose rate there is 1e-6 whatever that of the others.
    others = [("norm", ratio), ("classifier/bias", ratio), ("embed/*{lora_a,lora_b}*", 1e-6 / rate)]
    rules = lm.Rules(others) + recipes.lora_plus(params, ratio, head=["norm", "classifier"])
    assert got(rules, params) == pytest.approx(expected, rel=1e-12)
