"""The public names, the layering of the package, and what importing it must not pull in."""

import ast
import pathlib
import pickle
import subprocess
import sys

import pytest

import lrmult as lm

PACKAGE = pathlib.Path(lm.__file__).parent
ORDER = (
    "_errors",
    "_patterns",
    "_regions",
    "_layouts",
    "_paths",
    "_modules",
    "_positions",
    "_targets",
    "_multipliers",
    "_rules",
    "_structure",
    "_linen",
    "_structure_of",
    "_automaton",
    "_matching",
    "_claims",
    "_suggest",
    "_checks",
    "_parts",
    "_scaling",
    "_plan",
    "_attached",
    "_report",
    "_running",
    "_transform",
    "_freezing",
    "_view",
    "_states",
    "_wrap",
    "_migrate",
    "_subarrays",
    "_edit",
    "__init__",
)


def test_the_public_names():
    assert sorted(lm.__all__) == [
        "AxisError",
        "Claim",
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
        "migrate",
        "neurons",
        "of_type",
        "optional",
        "paths",
        "replace",
        "rows",
        "scale_by_rules",
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


def test_the_package_imports_only_its_dependencies():
    allowed = {*sys.stdlib_module_names, "jax", "numpy", "optax", "rich", "lrmult"}
    for path in PACKAGE.glob("*.py"):
        for module, _ in imports_of(path):
            is_adapter = path.stem == "_linen"  # imported where a user has passed something of it
            assert module.partition(".")[0] in (allowed | {"flax"} if is_adapter else allowed), (
                path.name,
                module,
            )


def test_patterns_know_no_arrays():
    for name in ("_errors", "_patterns", "_positions", "_layouts"):
        for module, _ in imports_of(PACKAGE / f"{name}.py"):
            assert module.partition(".")[0] not in {"jax", "numpy", "optax"}, (name, module)


def test_importing_pulls_in_no_optional_library():
    code = (
        "import sys, jax, optax; before = set(sys.modules); import lrmult as lm; "
        "lm.compile_rules([('a', 1)], {'a': 1.0}); "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'flax', 'equinox', 'haiku', 'rich', 'matplotlib', 'yaml'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_rules_can_be_pickled():
    rules = lm.Rules([("a[0]", 1), (slice(0, 2), None), (("b", -1, ...), 3)]) + lm.optional(0.5)
    assert pickle.loads(pickle.dumps(rules)) == rules
