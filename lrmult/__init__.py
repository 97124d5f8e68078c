"""Per-parameter learning-rate multipliers and freezing for JAX, by ordered rules.

The names, in the order of use: `paths` lists what rules may speak of and `structure_of` reads
what these do not tell, `Rules` holds what rules say, `compile_rules` makes a `Plan` of them, and
`scale_by_rules` or `wrap` apply them after or around any optimizer. `extract`, `replace` and
`graft` read and write parts of a model by the same paths.
"""

from lrmult._attached import attach, attached_rules
from lrmult._edit import extract, graft, replace
from lrmult._errors import (
    AxisError,
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
from lrmult._freezing import assert_frozen, stop_frozen
from lrmult._migrate import migrate
from lrmult._parts import Parts
from lrmult._paths import paths
from lrmult._plan import Claim, LeafPlan, Plan, compile_rules, trainable_mask
from lrmult._rules import Rule, Rules, optional
from lrmult._structure import Structure
from lrmult._structure_of import structure_of
from lrmult._targets import along, elements, neurons, of_type, rows
from lrmult._transform import scale_by_rules
from lrmult._wrap import wrap

__version__ = "0.1.0"

__all__ = [
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

for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__  # what tracebacks and reprs show
