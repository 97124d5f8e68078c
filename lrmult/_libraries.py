"""The libraries that models are made with.

None is imported here: something of one can only be there if it is imported already.
"""

import sys
from typing import Any


def loaded_nnx() -> Any:
    """`flax.nnx`, if it is imported; None if not."""
    return sys.modules.get("flax.nnx")


def loaded_equinox() -> Any:
    """`equinox`, if it is imported; None if not."""
    return sys.modules.get("equinox")


def module_types() -> tuple[type, ...]:
    """The base classes of modules of NNX and Equinox."""
    return tuple(library.Module for library in (loaded_nnx(), loaded_equinox()) if library)


def is_module(value: Any) -> bool:
    """Whether it is a module of NNX or Equinox."""
    return isinstance(value, module_types())


def is_nnx_module(value: Any) -> bool:
    """Whether it is a module of NNX, which is changed in place."""
    nnx = loaded_nnx()
    return nnx is not None and isinstance(value, nnx.Module)


def is_linen_module(value: Any) -> bool:
    """Whether it is a module of Linen."""
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(value, linen.Module)


def is_variable(value: Any) -> bool:
    """Whether it is a variable of NNX."""
    nnx = loaded_nnx()
    return nnx is not None and isinstance(value, nnx.Variable)


def box_types() -> tuple[type, ...]:
    """The classes that hold an array under ``value``: variables of NNX, and boxes of Linen."""
    found = []
    for module, name in (("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata")):
        box = getattr(sys.modules.get(module), name, None)
        if isinstance(box, type):
            found.append(box)
    return tuple(found)
