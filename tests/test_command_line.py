import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import warnings

import flax.serialization
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import lrmult as lm
from lrmult import _command_line
from lrmult._command_line import main

ROOT = pathlib.Path(lm.__file__).parents[1]
PARAMS = {
    "embed": {"embedding": np.arange(12, dtype=np.float32).reshape(6, 2)},
    "layers_0": {"kernel": np.eye(2, dtype=np.float32), "bias": np.ones(2, np.float32)},
    "layers_1": {"kernel": np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32)},
    "head": {"kernel": np.ones((2, 3), np.float32), "bias": np.zeros(3, np.float32)},
}
RULES = [("embed", None), (lm.neurons("layers_0", 0), None), ("head", 10), ("layers_1/bias", 0.5)]


def flat(tree, separator="/"):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator=separator): x for p, x in leaves}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a checkpoint and rules for it."""
    monkeypatch.chdir(tmp_path)
    np.savez("model.npz", **flat(PARAMS))
    write_rules(RULES)
    return tmp_path


def write_rules(rules, path="rules.json"):
    pathlib.Path(path).write_text(json.dumps(lm.Rules(rules).to_dict()))


@pytest.fixture
def run(folder, capsys):
    def call(*arguments):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return call


# ---- explain


def test_explain_prints_the_plan_and_what_freezing_saves(run):
    status, out, err = run("explain", "model.npz", "--rules", "rules.json")
    table = str(lm.compile_rules(RULES, PARAMS))
    assert (status, err) == (0, "")
    assert out.startswith(table + "\n")
    assert out.removeprefix(table).splitlines() == [
        "",
        "state of adamw            268 B",
        "in lrmult.wrap            172 B   96 B less (36%)",
        "there with compact=True   148 B   120 B less (45%)",
    ]


def state_bytes(optimizer):
    return sum(
        leaf.nbytes for leaf in jax.tree.leaves(optimizer.init(jax.tree.map(jnp.asarray, PARAMS)))
    )


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon"])
def test_the_memory_is_that_of_real_states(name, run):
    status, out, _ = run(
        "explain", "model.npz", "--rules", "rules.json", "--json", "--optimizer", name
    )
    optimizer = getattr(optax, name, None) or getattr(optax.contrib, name)
    optimizer = optimizer(learning_rate=0.1)
    assert status == 0
    assert json.loads(out)["optimizer"] == name
    assert json.loads(out)["state_bytes"] == {
        "alone": state_bytes(optimizer),
        "wrap": state_bytes(lm.wrap(optimizer, RULES)),
        "compact": state_bytes(lm.wrap(optimizer, RULES, compact=True)),
    }


def test_an_optimizer_that_does_not_take_the_arrays(run):
    np.savez("ints.npz", a=np.ones(3, np.int32), b=np.ones(3))
    write_rules([("b", None)])
    status, out, err = run(
        "explain", "ints.npz", "--rules", "rules.json", "--optimizer", "schedule_free_sgd", "--json"
    )
    assert status == 0
    if json.loads(out)["state_bytes"] is None:
        assert err.startswith("lrmult: warning: the optimizer does not take these arrays (")


def test_explain_as_json(run):
    status, out, _ = run("explain", "model.npz", "--rules", "rules.json", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["checkpoint"] == "model.npz"
    assert (found["arrays"], found["trained"], found["frozen"]) == (7, 18, 15)
    assert found["warnings"] == []
    leaves = {leaf.pop("path"): leaf for leaf in found["leaves"]}
    assert list(leaves) == lm.paths(PARAMS)
    assert leaves["embed/embedding"] == {
        "shape": [6, 2],
        "dtype": "float32",
        "rules": [[0, "'embed' -> frozen"]],
        "multiplier": 0.0,
        "trained": 0,
        "frozen": 12,
    }
    assert leaves["head/bias"]["multiplier"] == 10
    assert leaves["layers_0/kernel"]["multiplier"] == "[:, 0] frozen; rest 1"
    assert leaves["layers_1/kernel"]["rules"] == []


def test_schedules_in_a_file_are_told(run):
    rule = {"target": "head", "multiplier": {"start": 100}}
    pathlib.Path("rules.json").write_text(json.dumps([rule]))
    status, out, _ = run("explain", "model.npz", "--rules", "rules.json", "--json")
    assert status == 0
    found = {leaf["path"]: leaf["multiplier"] for leaf in json.loads(out)["leaves"]}
    assert isinstance(found["head/bias"], str)


def test_recipes_in_a_file_see_the_checkpoint(run):
    pathlib.Path("rules.toml").write_text('[[rules]]\nrecipe = "bitfit"\n')
    status, out, err = run("explain", "model.npz", "--rules", "rules.toml")
    assert (status, err) == (0, "")
    assert "7 train, 26 frozen" in out


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("hed", 10)], r"rule 0 ('hed' -> 10): no path matches 'hed'; did you mean 'head'?"),
        ([(..., 0.1), ("head", None)], "rule 1 ('head' -> frozen)"),
        ([("layers[7]", None)], "rule 0"),
        ([(lm.rows("embed", 6), None)], "rule 0"),
        ({"rules": [{"target": "a[", "multiplier": 1}]}, "rule 0"),
        ({"rules": [{"target": "head", "multiplier": "fast"}]}, "'fast' is no multiplier"),
        ({"rule": []}, "rules.json"),
    ],
)
def test_mistakes_in_rules(rules, message, run):
    if isinstance(rules, dict):
        pathlib.Path("rules.json").write_text(json.dumps(rules))
    else:
        write_rules(rules)
    status, out, err = run("explain", "model.npz", "--rules", "rules.json")
    assert (status, out) == (1, "")
    assert err.startswith("lrmult: error: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("file", ["absent.toml", "model.npz", "broken.toml", "."])
def test_files_that_hold_no_rules(file, run):
    pathlib.Path("broken.toml").write_text("[[rules")
    status, out, err = run("explain", "model.npz", "--rules", file)
    assert (status, out) == (1, "")
    assert file in err


def test_mistakes_may_be_warnings(run):
    write_rules([("hed", 10), (..., 0.1), ("head", None)])
    status, out, err = run("explain", "model.npz", "--rules", "rules.json", "--no-strict")
    assert status == 0
    assert [line.partition(" (")[0] for line in err.splitlines()] == [
        "lrmult: warning: rule 0",
        "lrmult: warning: rule 2",
    ]
    assert "33 train, 0 frozen" in out
    status, out, _ = run("explain", "model.npz", "--rules", "rules.json", "--no-strict", "--json")
    assert status == 0
    assert len(json.loads(out)["warnings"]) == 2
    write_rules([("layers[7]", None)])  # no warning can say what this would mean
    assert run("explain", "model.npz", "--rules", "rules.json", "--no-strict")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["explain", "model.npz"], "required: --rules"),
        (["explain", "absent.npz", "--rules", "rules.json"], "absent.npz cannot be read"),
        (["explain", "rules.json", "--rules", "rules.json"], "rules.json is no checkpoint"),
        (["explain", ".", "--rules", "rules.json"], "write the path of a file: 'model.npz'"),
        (["explain", "model.npz", "--rules", "rules.json", "--at", "hed"], "did you mean 'head'"),
        (["explain", "model.npz", "--rules", "rules.json", "--separator", ""], "it is empty"),
        (
            ["explain", "model.npz", "--rules", "rules.json", "--optimizer", "adaam"],
            "optax has no 'adaam' that takes a learning rate and needs nothing else; it has 'adam'",
        ),
        (["explain", "model.npz", "--rules", "rules.json", "--optimizer", "zzz"], "'adamw'"),
        (["paths", "absent.npz"], "absent.npz cannot be read"),
        (["diff", "model.npz", "absent.npz"], "absent.npz cannot be read"),
        (["diff", "model.npz", "model.npz", "--rules", "absent.toml"], "absent.toml"),
    ],
)
def test_trouble(arguments, message, run):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_a_mistake_in_rules_is_trouble_for_diff(run):
    write_rules([("hed", 10)])
    status, out, err = run("diff", "model.npz", "model.npz", "--rules", "rules.json")
    assert (status, out) == (2, "")
    assert "did you mean 'head'" in err
    status, _, err = run("diff", "model.npz", "model.npz", "--rules", "rules.json", "--no-strict")
    assert status == 0
    assert err.startswith("lrmult: warning: rule 0")


def test_an_error_of_the_package_itself_is_no_verdict(folder, capsys, monkeypatch):
    monkeypatch.setattr(_command_line, "read_checkpoint", lambda *_, **__: 1 / 0)
    assert main(["paths", "model.npz"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_interruption_is_silent(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_command_line, "read_checkpoint", interrupt)
    assert run("paths", "model.npz") == (130, "", "")


# ---- --at and --separator


def test_a_train_state_without_at(run):
    state = {"params": PARAMS, "opt_state": {"mu": PARAMS}, "step": 3}
    pathlib.Path("state.msgpack").write_bytes(flax.serialization.to_bytes(state))
    status, _, err = run("explain", "state.msgpack", "--rules", "rules.json")
    assert status == 1
    assert "did you mean 'params/embed' or 'opt_state/mu/embed'?" in err
    assert err.endswith("for these alone, add --at params\n")
    write_rules([("params/embed", None)], "full.json")
    status, _, err = run("explain", "state.msgpack", "--rules", "full.json")
    assert status == 0
    assert err.startswith("lrmult: note: state.msgpack has more than parameters in it")
    status, out, err = run("explain", "state.msgpack", "--rules", "rules.json", "--at", "params")
    assert (status, err) == (0, "")
    assert out == run("explain", "model.npz", "--rules", "rules.json")[1]


def test_names_with_dots(run):
    np.savez("dots.npz", **flat(PARAMS, "."))
    status, _, err = run("explain", "dots.npz", "--rules", "rules.json")
    assert status == 1
    assert err.endswith(
        "names in dots.npz hold dots, and no '/'; to split them, add --separator .\n"
    )
    status, out, err = run("explain", "dots.npz", "--rules", "rules.json", "--separator", ".")
    assert (status, err) == (0, "")
    assert out == run("explain", "model.npz", "--rules", "rules.json")[1]


# ---- paths


def test_paths(run):
    np.savez(
        "some.npz", **{"a/b": np.ones((2, 3)), "longer\n": np.ones(()), "x*": np.ones(3, bool)}
    )
    status, out, err = run("paths", "some.npz")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "a/b        float64   [2,3]",
        "longer\\n   float64   []",
        "x\\*        bool      [3]",
    ]
    found = json.loads(run("paths", "some.npz", "--json")[1])
    assert found["leaves"][0] == {"path": "a/b", "shape": [2, 3], "dtype": "float64"}
    assert [leaf["path"] for leaf in found["leaves"]] == ["a/b", "longer\n", "x\\*"]
    assert run("paths", "some.npz", "--at", "a")[1] == "b   float64   [2,3]\n"


# ---- diff


def changed(**values):
    """The parameters with other arrays at some paths (`__` for `/`), or none where it is None."""
    found = flat(PARAMS) | {path.replace("__", "/"): value for path, value in values.items()}
    return {path: value for path, value in found.items() if value is not None}


def test_no_difference(run):
    np.savez_compressed("same.npz", **flat(PARAMS))
    status, out, err = run("diff", "model.npz", "same.npz", "--rules", "rules.json")
    assert (status, err) == (0, "")
    assert out == "7 arrays: 0 differ, 7 are equal bit by bit; 0 differ in what is frozen\n"


def test_differences(run):
    kernel = np.array([[1, 0], [0.5, 1]], np.float32)
    np.savez(
        "after.npz",
        **changed(
            layers_0__kernel=kernel,
            layers_1__bias=np.array([-0.0, 0.0], np.float32),
            head__kernel=np.full((2, 3), np.nan, np.float32),
            head__bias=None,
            head__new=np.ones(4, np.float16),
            layers_1__kernel=np.eye(2, dtype=np.float16),
        ),
    )
    status, out, err = run("diff", "model.npz", "after.npz", "--rules", "rules.json")
    assert (status, err) == (1, "")
    assert out.splitlines() == [
        "parameters        array          differ                by at most   frozen",
        "head/bias         float32[3]     only in A",
        "head/kernel       float32[2,3]   6 of 6                nan",
        "layers_0/kernel   float32[2,2]   1 of 4                0.5          "
        "1, at [1, 0]: 0.0 became 0.5",
        "layers_1/bias     float32[2]     1 of 2                0",
        "layers_1/kernel   float32[2,2]   became float16[2,2]",
        "head/new          float16[4]     only in B",
        "",
        "8 arrays: 6 differ, 2 are equal bit by bit; 1 differ in what is frozen",
    ]
    status, out, _ = run("diff", "model.npz", "after.npz", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["frozen_differ"] is None
    by_path = {each["path"]: each for each in found["differences"]}
    assert by_path["layers_0/kernel"]["changed"] == 1
    assert by_path["layers_0/kernel"]["largest"] == 0.5
    assert by_path["layers_1/bias"]["largest"] == 0
    assert by_path["head/kernel"]["largest"] == "nan"
    assert by_path["head/bias"]["after"] is None
    assert by_path["head/new"]["before"] is None
    assert by_path["layers_1/kernel"]["after"] == {"shape": [2, 2], "dtype": "float16"}


FROZEN_NAN = np.array([[np.nan, 1], [0, -0.0]], np.float32)


@pytest.mark.parametrize(
    ("before", "after", "rules", "status"),
    [
        ({"w": FROZEN_NAN}, {"w": FROZEN_NAN.copy()}, [("w", None)], 0),
        ({"w": FROZEN_NAN}, {"w": -FROZEN_NAN}, [("w", None)], 1),
        ({"w": np.zeros(3)}, {"w": np.array([0, -0.0, 0])}, [(lm.rows("w", 1), None)], 1),
        ({"w": np.zeros(3)}, {"w": np.array([0, -0.0, 0])}, [(lm.rows("w", 0), None)], 0),
        ({"w": np.zeros(3)}, {"w": np.zeros(4)}, [(lm.rows("w", 0), None)], 1),
        ({"w": np.zeros(3)}, {"w": np.zeros(4)}, [("w", 2)], 0),
        ({"w": np.zeros(3)}, {"w": np.zeros(3, np.float32)}, [("w", None)], 1),
        ({"w": np.zeros(3), "v": 0.0}, {"v": 0.0}, [("w", None)], 1),
        ({"w": np.zeros(3), "v": 0.0}, {"v": 0.0}, [("v", None)], 0),
        ({"a/v": 0.0}, {"a/v": 0.0, "a/w": 1.0}, [("a", None)], 1),
        ({"a/v": 0.0}, {"a/v": 0.0, "b": 1.0}, [("a", None)], 0),
        ({"n": np.array(2**62)}, {"n": np.array(-(2**62))}, [("n", None)], 1),
        ({"w": np.ones(0)}, {"w": np.ones(0)}, [("w", None)], 0),
    ],
)
def test_what_is_frozen_decides_the_status(before, after, rules, status, run):
    np.savez("before.npz", **before)
    np.savez("after.npz", **after)
    write_rules(rules)
    assert run("diff", "before.npz", "after.npz", "--rules", "rules.json")[0] == status
    assert run("diff", "before.npz", "after.npz")[0] == 0


@pytest.mark.parametrize(
    ("before", "after", "largest"),
    [
        (np.array(2**63 - 1), np.array(-(2**63)), 2.0**64),
        (np.array(3, np.uint8), np.array(250, np.uint8), 247),
        (np.array(False), np.array(True), 1),
        (np.array([np.inf, 1.0]), np.array([-np.inf, 2.0]), "inf"),
        (np.array([np.nan, 1.0]), np.array([0.0, 1.5]), 0.5),
        (np.array(1 + 1j), np.array(4 + 5j), 5),
        (np.array(1e308), np.array(-1e308), "inf"),
        (jnp.array(1, jnp.bfloat16), jnp.array(1.5, jnp.bfloat16), 0.5),
    ],
)
def test_the_largest_difference(before, after, largest, run):
    np.savez("before.npz", a=before)
    np.savez("after.npz", a=after)
    [found] = json.loads(run("diff", "before.npz", "after.npz", "--json")[1])["differences"]
    assert found["largest"] == largest


def test_differences_across_formats_and_blocks(run, monkeypatch):
    monkeypatch.setattr(_command_line, "_BLOCK", 5)
    after = jax.tree.map(np.array, PARAMS)
    after["embed"]["embedding"][[1, 4, 5], [0, 1, 1]] += [1, 2, 3]
    pathlib.Path("after.msgpack").write_bytes(flax.serialization.to_bytes({"params": after}))
    np.savez("before.npz", **flat({"params": PARAMS}))
    arguments = ["diff", "before.npz", "after.msgpack", "--rules", "rules.json", "--at", "params"]
    status, out, _ = run(*arguments)
    assert status == 1
    assert "3 of 12   3            3, at [1, 0]: 2.0 became 3.0" in out


TARGETS = (
    "embed",
    "**/bias",
    lm.rows("embed", [1, 2]),
    lm.neurons("layers_0", 1),
    lm.along("head/kernel", 1, 2),
    lm.elements("layers_1/kernel", np.eye(2, dtype=bool)),
)


@settings(max_examples=40)
@given(data=st.data())
def test_diff_agrees_with_assert_frozen(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    after = jax.tree.map(np.array, PARAMS)
    for leaf in jax.tree.leaves(after):
        if data.draw(st.booleans()):
            place = data.draw(st.integers(0, leaf.size - 1))
            leaf.reshape(-1)[place] = data.draw(st.sampled_from([0.0, -0.0, 1.0, math.nan, 7.0]))
    rule = st.tuples(st.sampled_from(TARGETS), st.sampled_from([None, 2.0]))
    rules = data.draw(st.lists(rule, min_size=1, max_size=4))
    np.savez(folder / "before.npz", **flat(PARAMS))
    np.savez(folder / "after.npz", **flat(after))
    write_rules(rules, folder / "rules.json")
    files = [str(folder / name) for name in ("before.npz", "after.npz", "rules.json")]
    status = main(["diff", *files[:2], "--rules", files[2], "--no-strict"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lm.assert_frozen(PARAMS, after, rules, strict=False)
    except lm.FrozenError:
        assert status == 1
    else:
        assert status == 0


# ---- the command itself


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "lrmult", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)},
        **options,
    )


def test_a_job_script(folder):
    write_rules([("hed", 10)], "dead.json")
    process = command("explain", "model.npz", "--rules", "dead.json", stdout=subprocess.PIPE)
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert re.fullmatch("lrmult: error: rule 0 .* did you mean 'head'.*\n", err)


def test_a_reader_that_goes_away(folder):
    reader, writer = os.pipe()
    process = command("paths", "model.npz", stdout=writer)
    os.close(writer)
    os.close(reader)
    assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_a_terminal(folder):
    pty = pytest.importorskip("pty")
    here, there = pty.openpty()
    process = command("explain", "model.npz", "--rules", "rules.json", stdout=there)
    os.close(there)
    shown = b""
    while b"compact=True" not in shown:
        shown += os.read(here, 10_000)
    process.communicate()
    os.close(here)
    assert process.returncode == 0
    assert b"\x1b[1m" in shown  # the heads are bold
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    lines = [line.rstrip() for line in text.splitlines()]
    plan = str(lm.compile_rules(RULES, PARAMS)).splitlines()
    assert lines[: len(plan)] == plan


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--help"], ["diff", "--help"]])
def test_help(arguments, run):
    status, out, _ = run(*arguments)
    assert status == 0
    assert "usage: lrmult" in out
    assert "exit status" in out or "examples:" in out


def test_version(run):
    assert run("--version") == (0, f"lrmult {lm.__version__}\n", "")


def test_the_script_is_declared():
    project = ROOT / "pyproject.toml"
    if not project.exists():
        pytest.skip("not run in a checkout")
    scripts = tomllib.loads(project.read_text())["project"]["scripts"]
    assert scripts == {"lrmult": f"{main.__module__}:{main.__name__}"}
