"""The public names, gathered from where they live."""

from lrmult import recipes
from lrmult._attached import attach, attached_rules
from lrmult._decay import scale_decay
from lrmult._edit import extract, graft, replace
from lrmult._errors import (
    AxisError,
    FeaturesError,
    FrozenError,
    IndexRangeError,
    LrmultError,
    MaskError,
    MultiplierError,
    PatternError,
    PositionError,
    RuleError,
    ShadowedRuleError,
    UnmatchedRuleError,
)
from lrmult._features import CachedFeatures
from lrmult._freezing import assert_frozen, stop_frozen
from lrmult._migrate import migrate
from lrmult._of_type import of_type
from lrmult._parts import Parts
from lrmult._paths import paths
from lrmult._plan import Claim, LeafPlan, Plan, compile_rules, trainable_mask
from lrmult._precompute import Precomputed, precompute
from lrmult._rule_files import load_rules
from lrmult._rules import Rule, Rules, optional
from lrmult._schedules import During
from lrmult._structure import Structure
from lrmult._structure_of import structure_of
from lrmult._targets import along, elements, neurons, rows
from lrmult._transform import scale_by_rules
from lrmult._wrap import wrap

__all__ = [
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

for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = "lrmult"  # what tracebacks and reprs show
