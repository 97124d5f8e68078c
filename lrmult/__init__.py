"""Per-parameter learning-rate multipliers and freezing for JAX, by ordered rules.

The names, in the order of use: `paths` lists what rules may speak of and `structure_of` reads
what these do not tell, `Rules` holds what rules say, `compile_rules` makes a `Plan` of them, and
`scale_by_rules` or `wrap` apply them after or around any optimizer. `recipes` holds known methods
as rules, `load_rules` reads rules from a file. `extract`, `replace` and `graft` read and write
parts of a model by the same paths.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrmult._api import *

__version__ = "0.1.0"

__all__ = [
    "AxisError",
    "Claim",
    "During",
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
    "load_rules",
    "migrate",
    "neurons",
    "of_type",
    "optional",
    "paths",
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


def __getattr__(name: str) -> Any:
    # All else is imported when the first name is asked for: a program that imports a configuration,
    # and this package with it, may never compile a rule.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lrmult import _api

    globals().update({each: getattr(_api, each) for each in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
