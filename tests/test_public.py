"""The public names, the layering of the package, and what importing it must not pull in."""

import ast
import pathlib
import pickle
import subprocess
import sys
import tomllib

import pytest

import lrmult as lm

PACKAGE = pathlib.Path(lm.__file__).parent
ORDER = (
    "_errors",
    "_patterns",
    "_regions",
    "_layouts",
    "_libraries",
    "_levels",
    "_paths",
    "_modules",
    "_of_type",
    "_positions",
    "_targets",
    "_schedules",
    "_multipliers",
    "_rules",
    "_structure",
    "_linen",
    "_structure_of",
    "_structured",
    "_orders",
    "_automaton",
    "_matching",
    "_claims",
    "_suggest",
    "_checks",
    "_parts",
    "_scaling",
    "_plan",
    "recipes",
    "_rule_files",
    "_attached",
    "_folding",
    "_report",
    "_plots",
    "_running",
    "_transform",
    "_decay",
    "_freezing",
    "_view",
    "_states",
    "_wrap",
    "_migrate",
    "_subarrays",
    "_resolving",
    "_edit",
    "_work",
    "_programs",
    "_marks",
    "_cuts",
    "_splitting",
    "_arguments",
    "_precompute",
    "_stability",
    "_feature_files",
    "_features",
    "_checkpoints",
    "_command_line",
    "__main__",
    "_api",
    "__init__",
)


def test_the_public_names():
    assert sorted(lm.__all__) == [
        "AxisError",
        "CachedFeatures",
        "Claim",
        "During",
        "FeaturesError",
        "FrozenError",
        "IndexRangeError",
        "LeafPlan",
        "LrmultError",
        "MaskError",
        "MultiplierError",
        "Parts",
        "PatternError",
        "Plan",
        "PositionError",
        "Precomputed",
        "Rule",
        "RuleError",
        "Rules",
        "ShadowedRuleError",
        "Structure",
        "UnmatchedRuleError",
        "along",
        "assert_frozen",
        "attach",
        "attached_rules",
        "compile_rules",
        "elements",
        "extract",
        "graft",
        "load_rules",
        "migrate",
        "neurons",
        "of_type",
        "optional",
        "paths",
        "precompute",
        "recipes",
        "replace",
        "rows",
        "scale_by_rules",
        "scale_decay",
        "stop_frozen",
        "structure_of",
        "trainable_mask",
        "wrap",
    ]
    for name in lm.__all__:
        assert getattr(lm, name).__doc__, name


@pytest.mark.parametrize("name", [n for n in lm.__all__ if n.endswith("Error")])
def test_errors_are_value_errors(name):
    error = getattr(lm, name)
    assert issubclass(error, lm.LrmultError)
    assert issubclass(error, ValueError)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.col_offset == 0
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.col_offset == 0) for alias in node.names)


def test_files_import_only_from_files_above_them():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)
    for path in PACKAGE.glob("*.py"):
        for module, at_top in imports_of(path):
            if module.startswith("lrmult.") and at_top:
                above = module.removeprefix("lrmult.")
                assert ORDER.index(above) < ORDER.index(path.stem), (path.stem, above)


# What is imported only where a user has passed something of it, or asked for it.
ADAPTERS = {
    "_linen": {"flax"},
    "_rule_files": {"yaml"},
    "_plots": {"matplotlib"},
    "_checkpoints": {"orbax", "ml_dtypes"},
}


def test_the_package_imports_only_its_dependencies():
    allowed = {*sys.stdlib_module_names, "jax", "numpy", "optax", "rich", "lrmult"}
    for path in PACKAGE.glob("*.py"):
        adapted = ADAPTERS.get(path.stem, set())
        for module, at_top in imports_of(path):
            name = module.partition(".")[0]
            assert name in (allowed | adapted), (path.name, module)
            assert not (at_top and name in adapted and path.stem != "_linen"), (path.name, module)


def test_patterns_know_no_arrays():
    for name in ("_errors", "_patterns", "_positions", "_layouts"):
        for module, _ in imports_of(PACKAGE / f"{name}.py"):
            assert module.partition(".")[0] not in {"jax", "numpy", "optax"}, (name, module)


OPTIONAL = {"flax", "equinox", "haiku", "rich", "matplotlib", "yaml", "orbax", "safetensors"}


def modules_after(code):
    """The modules that some code imports, beyond those of jax and optax."""
    first, last = (
        "import sys, jax, optax; before = set(sys.modules)",
        "print(*set(sys.modules) - before)",
    )
    code = f"{first}; {code}; {last}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_imports_nothing():
    assert modules_after("import lrmult") == {"lrmult"}


def test_using_it_pulls_in_no_optional_library():
    code = (
        "import lrmult as lm; lm.compile_rules([('a', 1)], {'a': 1.0}); lm.recipes; lm.load_rules"
    )
    assert not {name.partition(".")[0] for name in modules_after(code)} & OPTIONAL


def test_the_names_are_there_when_they_are_asked_for():
    assert {*lm.__all__} <= {*dir(lm)}
    with pytest.raises(AttributeError, match="module 'lrmult' has no attribute 'freeze'"):
        _ = lm.freeze
    code = "from lrmult import *; print(wrap, RuleError('x').__class__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "<class 'lrmult.RuleError'>" in done.stdout


def test_the_oldest_versions_are_those_that_are_tested():
    """What CI installs as the oldest is what pyproject.toml says is enough."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    bounds = dict(name.split(">=") for name in wanted if ">=" in name)
    pins = (PACKAGE.parent / ".ci" / "oldest.txt").read_text().splitlines()
    for name, version in (line.split("==") for line in pins if not line.startswith("#")):
        if name != "jaxlib":
            assert (version + ".0").startswith(bounds[name] + "."), name


def test_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_rules_can_be_pickled():
    rules = lm.Rules([("a[0]", 1), (slice(0, 2), None), (("b", -1, ...), 3)]) + lm.optional(0.5)
    assert pickle.loads(pickle.dumps(rules)) == rules
