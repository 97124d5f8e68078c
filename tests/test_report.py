"""The table of a plan: what is folded, that every row is a rule, and its form in notebooks."""

import itertools
import os
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import lrmult as lm
from lrmult import _folding, _report
from tests.test_reference import trees
from tests.test_shared import TIED, one_leaf
from tests.trees import tree_of


def rows_of(plan):
    """The cells of every row of the printed table."""
    head, _, *lines = str(plan).splitlines()
    starts = [0, *(head.index(f" {name}") + 1 for name in ("arrays", "size")), len(head)]
    rows = list(itertools.takewhile(bool, lines))
    assert starts == sorted(starts)
    return [
        (line[: starts[1]].rstrip(), *re.split(" {2,}", line[starts[1] :].strip(), maxsplit=3))
        for line in rows
    ]


def claimed(paths, params, structure):
    """For each array, the number of the rule that has it, if these are the rules."""
    rules = [(... if path == "**" else path, 2) for path in paths]  # a bare array has no path
    plan = lm.compile_rules(rules, params, structure=structure)
    return {leaf.path: [index for index, _ in leaf.rules] for leaf in plan.leaves}


def check_rows(rows, plan, params, structure=None):
    """Every array is in one row; a row selects its arrays alone, and what it says of them is so."""
    paths = [row[0] for row in rows]
    found = claimed(paths, params, structure)
    # Where two rows select one array, the order of the rules decides.
    turned = claimed(paths[::-1], params, structure)
    assert found == {path: [len(rows) - 1 - i for i in turned[path]] for path in turned}
    sizes = [0] * len(rows)
    for leaf in plan.leaves:
        [number] = found[leaf.path]
        _, _, _, multiplier, rules = rows[number]
        sizes[number] += leaf.trained + leaf.frozen
        assert rules == ("; ".join(f"{i}: {plan.rules[i].text}" for i, _ in leaf.rules) or "none")
        if isinstance(leaf.multiplier, float):
            assert multiplier == (f"{leaf.multiplier:.12g}" if leaf.multiplier else "frozen")
    assert [f"{size:,}" for size in sizes] == [row[2] for row in rows]


# Trees of a thousand arrays -----------------------------------------------------------------------


def layer(path, weight="kernel", bias="bias"):
    return {f"{path}/{weight}": (4, 4), f"{path}/{bias}": (4,)}


def bert(layers=64):
    """Linen, as Hugging Face names it."""
    shapes = {f"embeddings/{name}_embeddings/embedding": (9, 4) for name in ("position", "word")}
    shapes |= layer("embeddings/LayerNorm", "scale") | layer("pooler/dense") | layer("classifier")
    for i in range(layers):
        for name in ("query", "key", "value"):
            shapes |= layer(f"encoder/layer_{i}/attention/self/{name}")
        for name in ("attention/output", "intermediate", "output"):
            shapes |= layer(f"encoder/layer_{i}/{name}/dense")
        for name in ("attention/output", "output"):
            shapes |= layer(f"encoder/layer_{i}/{name}/LayerNorm", "scale")
    return tree_of(shapes)


def haiku(layers=64):
    """Haiku: two levels of dicts, keys with slashes, and the first of a family without a number."""
    params = {"linear": {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}}
    for i in range(layers):
        for name in ("mha/query", "mha/key", "mha/value", "mha/linear", "linear", "linear_1"):
            params[f"transformer/layer_{i}/{name}"] = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
        for name in ("layer_norm", "layer_norm_1"):
            params[f"transformer/layer_{i}/{name}"] = {"scale": jnp.ones(4), "offset": jnp.ones(4)}
    return params


def efficientnet(stages=(4, 7, 7, 10, 10, 13, 4)):
    """Stages of unlike length, and a first block of each that is unlike the others."""
    shapes = layer("stem/bn", "scale") | {"stem/conv/kernel": (4, 4)} | layer("classifier")
    for stage, blocks in enumerate(stages):
        for block, name in itertools.product(range(blocks), ("expand", "depthwise", "project")):
            if stage or name != "expand":
                path = f"blocks/{stage}/{block}/{name}"
                shapes |= {f"{path}/conv/kernel": (4, 4)} | layer(f"{path}/bn", "scale")
        for block, name in itertools.product(range(blocks), ("reduce", "expand")):
            shapes |= layer(f"blocks/{stage}/{block}/se/{name}")
    return tree_of(shapes)


def keras_efficientnet(stages=(4, 7, 7, 10, 10, 13, 4)):
    """The same in Keras' names: one level, no numbers at the end."""
    shapes = {"stem_conv/kernel": (4, 4)} | layer("stem_bn", "gamma", "beta") | layer("predictions")
    for stage, blocks in enumerate(stages, 1):
        for letter in "abcdefghijklm"[:blocks]:
            for name in ("expand_", "dw", "project_") if stage > 1 else ("dw", "project_"):
                shapes[f"block{stage}{letter}_{name}conv/kernel"] = (4, 4)
                bn = name.replace("dw", "")
                shapes |= layer(f"block{stage}{letter}_{bn}bn", "gamma", "beta")
            for name in ("reduce", "expand"):
                shapes |= layer(f"block{stage}{letter}_se_{name}")
    return tree_of(shapes)


def unlike(count=330):
    """Layers of three kinds, whose names have nothing to do with that, nor with an order."""
    shapes = layer("head")
    names = map("".join, itertools.product("bdfgkl", "aeiou", "mnrst", "aeo"))
    for i, name in enumerate(itertools.islice(names, count)):
        if i // 7 % 3 == 0:
            shapes |= layer(name) | layer(f"{name}/norm", "scale")
        elif i // 7 % 3 == 1:
            shapes |= {f"{name}/conv/kernel": (4, 4)} | layer(f"{name}/bn", "scale")
        else:
            shapes |= {f"{name}/kernel": (4, 4), f"{name}/scale": (4,)}
    return tree_of(shapes)


def decay(stem, layers):
    return [(f"{stem}_{i}", 0.9 ** (layers - i)) for i in range(layers)]


THOUSANDS = {
    "biases": (bert, [("**/bias", 2)]),
    "a few rules": (
        bert,
        [("encoder/layer[:8]", None), ("**/LayerNorm", 0.1), ("**/bias", 2), ("classifier", 10)],
    ),
    "every third layer": (
        bert,
        [("**/bias", 2), ("encoder/layer[::3]", None), ("**/attention", 0.5)],
    ),
    "a rate for each layer": (bert, decay("encoder/layer", 64)),
    "a rate for each layer, and biases": (bert, [("**/bias", 2), *decay("encoder/layer", 64)]),
    "neurons": (
        bert,
        [
            (lm.neurons("encoder/layer_*/intermediate", [0, 1]), None),
            ("**/bias", 0.5),
            (lm.neurons("encoder/layer[:24]/output/dense", 3), None),
        ],
    ),
    "schedules": (
        bert,
        [("**/bias", 2)]
        + [(f"encoder/layer_{i}", lm.During(1.0, start=10 * i)) for i in range(1, 64)],
    ),
    "haiku": (haiku, [("**/{b,offset}", 2), ("transformer/layer[::2]", None)]),
    "haiku, a rate for each layer": (
        haiku,
        [("**/{b,offset}", 2), *decay("transformer/layer", 64)],
    ),
    "efficientnet": (efficientnet, [("**/se", 0.1), ("**/bias", 2), ("blocks[:3]", None)]),
    "keras": (
        keras_efficientnet,
        [("**/*_bn", 0.1), ("**/bias", 2), ("{stem_conv,block1*,block2*}", None)],
    ),
    "unlike names": (unlike, [("**/bias", 2)]),
    "unlike names, and a head": (unlike, [("head", 10), ("**/bias", 2)]),
    "unlike names, and norms": (
        unlike,
        [("head", 10), ("ba*", None), ("**/norm", 0.5), ("**/bias", 2), ("*ta", 3)],
    ),
}


@pytest.mark.parametrize("name", THOUSANDS)
def test_the_table_of_a_thousand_arrays_fits_a_screen(name):
    make, rules = THOUSANDS[name]
    params = make()
    plan = lm.compile_rules(rules, params)
    assert len(plan.leaves) > 690
    assert len(str(plan).splitlines()) < 80
    check_rows(rows_of(plan), plan, params)


def test_rows_of_unlike_siblings():
    rules = [("**/bias", 2), *decay("encoder/layer", 64)]
    rows = [row[0] for row in rows_of(lm.compile_rules(rules, bert()))]
    assert rows[0] == "{classifier,embeddings,pooler}/**/bias"
    assert "encoder/layer[0:64]/**/bias" in rows
    assert "encoder/layer_11/**/{scale,kernel}" in rows
    rows = [row[0] for row in rows_of(lm.compile_rules([("**/bias", 2)], unlike()))]
    assert rows == ["**/bias", "**/{kernel,scale}"]


def test_rows_are_folded_no_further_than_they_need_be():
    rules = [("encoder/layer[:8]", None), ("**/bias", 2)]
    rows = [row[0] for row in rows_of(lm.compile_rules(rules, bert()))]
    assert "encoder/layer[8:64]/attention/self/query/bias" in rows
    assert "encoder/layer[8:64]/attention/self/key/bias" in rows
    assert len(rows) < 40
    # One layer more that is unlike the others, and siblings are joined.
    rules += [("encoder/layer_9/attention", 3)]
    rows = [row[0] for row in rows_of(lm.compile_rules(rules, bert()))]
    assert "encoder/layer[8:64]/attention/self/{key,query,value}/bias" in rows
    assert "encoder/layer_9/attention/self/{key,query,value}/kernel" in rows
    # More than forty in any case, and two fewer would say less.
    rows = [row[0] for row in rows_of(lm.compile_rules(decay("encoder/layer", 64), bert()))]
    assert rows[:4] == ["classifier", "embeddings", "encoder/layer_0", "encoder/layer_1"]


@pytest.mark.parametrize(
    ("frozen", "paths"),
    [
        ([0, 2, 4, 6, 8, 10], ["x[0:11:2]", "x[1:12:2]"]),
        ([1, 4, 7, 10], ["x[0:10:3]", "x[1:11:3]", "x[2:12:3]"]),
        ([0, 1, 4, 5], ["x[0:2]", "x[2:4]", "x[4:6]", "x[6:12]"]),
        ([5], ["x[0:5]", "x_5", "x[6:12]"]),
        ([0, 2], ["x_0", "x_1", "x_2", "x[3:12]"]),
    ],
)
def test_numbered_siblings_that_are_alike_are_slices(frozen, paths):
    params = {f"x_{i}": {"w": jnp.ones(2), "b": jnp.ones(2)} for i in range(12)}
    plan = lm.compile_rules([("x_{" + ",".join(map(str, frozen)) + "}", None)], params)
    assert [row[0] for row in rows_of(plan)] == paths
    check_rows(rows_of(plan), plan, params)


def test_a_slice_goes_over_numbers_that_are_missing():
    params = {f"x_{i}": jnp.ones(2) if i != 3 else None for i in range(6)} | {"y": jnp.ones(1)}
    assert rows_of(lm.compile_rules([("y", 2)], params))[0][0] == "x[0:6]"
    del params["x_2"]
    assert rows_of(lm.compile_rules([("y", 2)], params))[0][0] == "x[0:6]"


def test_a_name_without_a_number_is_the_first_of_its_family():
    params = {f"linear{end}": {"w": jnp.ones(2)} for end in ("", "_1", "_2")} | {"y": jnp.ones(1)}
    assert rows_of(lm.compile_rules([("y", 2)], params))[0][0] == "linear[0:3]"
    params["linear"] = [jnp.ones(2), jnp.ones(2)]  # linear[1] is below it now
    rows = rows_of(lm.compile_rules([("y", 2)], params))
    assert [row[0] for row in rows] == ["linear", "linear_[1:3]", "y"]


def test_names_with_characters_of_patterns():
    names = ["a*", "{b}", "c,d", "[0]", "e\\", "f"]
    params = {
        f"{name}{end}": {"w": jnp.ones(2), "b": jnp.ones(2)} for name in names for end in "xy"
    }
    rules = [(("a*x",), 3), ("**/b", 2)]
    plan = lm.compile_rules(rules, params)
    for detail in _folding._DETAILS:
        rows = folded(plan, detail)
        assert len(rows) == (3 if detail.row_by_row else 23)
        check_rows(rows, plan, params)


def test_an_array_may_be_called_as_a_node_elsewhere():
    params = {"a": {"bias": jnp.ones(2), "k": jnp.ones(2)}, "b": {"bias": {"k": jnp.ones(2)}}}
    plan = lm.compile_rules([("a/bias", 2)], params)
    for detail in _folding._DETAILS:
        check_rows(folded(plan, detail), plan, params)


def test_arrays_of_one_name_get_different_answers():
    params = {name: {"k": jnp.ones(2), "b": jnp.ones(2)} for name in "ace"}
    params["d"] = {"k": jnp.ones(2)}
    plan = lm.compile_rules([("c/b", 2), ("e", 3)], params)
    rows = folded(plan, _folding._DETAILS[2])
    check_rows(rows, plan, params)
    assert [row[0] for row in rows] == ["a/b", "{a,c,d}/k", "c/b", "e"]


def test_positions_below_any_name():
    params = {name: [jnp.ones(2), jnp.ones(2), jnp.ones(2)] for name in ("x_0", "x_1", "y")}
    plan = lm.compile_rules([("*/2", 2)], params)
    rows = folded(plan, _folding._DETAILS[1])
    check_rows(rows, plan, params)
    assert [row[0] for row in rows] == ["*/[0:2]", "*/2"]  # *[0:2] would be x[0:2] too


@pytest.mark.parametrize("others", [("abcd", "x"), ("abd", "x"), ("a", "x"), ("xbc", "yc")])
def test_names_that_begin_or_end_as_others_do(others):
    params = {name: {"k": jnp.ones(2)} for name in ("ab", "abc", "bc", *others)}
    plan = lm.compile_rules([((name,), 2) for name in others], params)
    check_rows(folded(plan, _folding._DETAILS[1]._replace(braces=3)), plan, params)


def folded(plan, detail):
    """The cells of the table with that much detail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_folding, "_DETAILS", (detail,))
        return [row.cells for row in _report._rows(plan)]


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    trees,
    st.sampled_from(["name", "top", "below the top", "path"]),
    st.lists(st.integers(0, 2), min_size=9, max_size=9),
    st.sampled_from(
        [*_folding._DETAILS[:3], *(d._replace(braces=3) for d in _folding._DETAILS[1:3])]
    ),
)
def test_every_row_is_a_rule(params, what, kinds, detail):
    """Of trees that rules cut in any way, in any detail, however short lists in braces are."""

    def kind(path):
        first, _, rest = path.partition("/")
        key = {"name": path.split("/")[-1], "top": first, "below the top": rest, "path": path}[what]
        return kinds[sum(map(ord, key)) % len(kinds)]

    rules = [(lambda path, _: kind(path) == 0, None), (lambda path, _: kind(path) == 1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arrays that Hypothesis has put in two places
        try:
            plan = lm.compile_rules(lm.optional(rules), params)
        except lm.RuleError:  # two arrays of one path
            assume(False)
        check_rows(folded(plan, detail), plan, params)


def test_a_row_takes_in_no_array_that_stands_elsewhere():
    params = one_leaf() | {"head": {"bias": jnp.ones(2), "gain": jnp.ones(2)}}
    plan = lm.compile_rules([("embed", None), ("head", 2)], params, structure=TIED)
    check_rows(rows_of(plan), plan, params, TIED)
    for detail in _folding._DETAILS:
        rows = folded(plan, detail)
        check_rows(rows, plan, params, TIED)
        assert "head" not in [row[0] for row in rows]  # which leads to embed/embedding too
    assert "**" in [row[0] for row in rows_of(lm.compile_rules(2, params, structure=TIED))]


def test_rows_of_stacks():
    structure = lm.Structure(stacked={"layers": 0})
    params = {"layers": {str(i): jnp.ones((4, 2)) for i in range(3)}, "head": jnp.ones(2)}
    plan = lm.compile_rules([("layers[:2]", None), ("head", 3)], params, structure=structure)
    assert [row[0] for row in rows_of(plan)] == ["head", "layers"]
    plan = lm.compile_rules([("layers/2", None)], params, structure=structure)
    # layers[0:2] would be layers of the stack.
    assert [row[0] for row in rows_of(plan)] == ["head", "layers/0", "layers/1", "layers/2"]


# In notebooks -------------------------------------------------------------------------------------


class Cells(HTMLParser):
    """The cells of the rows of a table, and whether a row is dimmed."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.dimmed, self.open, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.dimmed.append("opacity" in dict(attrs).get("style", ""))
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data
        self.text += data


def test_a_notebook_shows_the_rows_of_the_table():
    rules = [("encoder/layer[:8]", None), ("**/bias", 2), (lm.rows("classifier", 0), None)]
    plan = lm.compile_rules(rules, bert())
    cells = Cells(plan._repr_html_())
    assert cells.rows[0] == ["parameters", "arrays", "size", "multiplier", "rule"]
    assert [tuple(row) for row in cells.rows[1:]] == rows_of(plan)
    assert cells.dimmed[1:] == [row[3] == "frozen" for row in rows_of(plan)]
    assert str(plan).splitlines()[-1] in cells.text


def test_what_a_notebook_shows_is_escaped():
    names = ["<script>alert(1)</script>", "a&amp;b", 'c" onclick="x', "d'"]
    plan = lm.compile_rules(
        [((names[0].replace("/", "|"),), None)], {n.replace("/", "|"): jnp.ones(2) for n in names}
    )
    text = plan._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;|script&gt;" in text
    shown = [row[0] for row in Cells(text).rows[1:]]
    assert sorted(shown) == sorted(row[0] for row in rows_of(plan))
    assert plan.rules[0].text in Cells(text).text
    lost = lm.compile_rules(lm.optional([("<b>", 2)]), {"a": jnp.ones(1)})
    assert "&lt;b&gt;" in lost._repr_html_()


TABLE = """
import itertools, lrmult as lm
names = map("".join, itertools.product("bdfg", "aeiou", "mnrst"))
params = {n: dict.fromkeys("xyz"[i // 7 % 3 :], {"b": 1.0, "w": 1.0}) for i, n in enumerate(names)}
table = lm.compile_rules([("ba*", None), ("**/b", 2), ("*t", 3)], params)._repr_html_()
"""


def test_a_notebook_needs_no_rich_and_no_luck_with_hashes():
    tables = set()
    for seed in "12":  # sets of texts have another order
        done = subprocess.run(
            [sys.executable, "-c", f"{TABLE}import sys; print('rich' in sys.modules, table)"],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        tables.add(done.stdout)
    [table] = tables
    assert table.startswith("False <div")
    assert "410 arrays" in table
