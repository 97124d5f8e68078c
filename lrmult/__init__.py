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
    from lrmult._api import __all__ as __all__

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # All else is imported when the first name is asked for: a program that imports a configuration,
    # and this package with it, may never compile a rule.
    if name == "__all__" or not name.startswith("_"):
        from lrmult import _api

        globals().update({each: getattr(_api, each) for each in ("__all__", *_api.__all__)})
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__getattr__("__all__"), *globals()})
