"""Targets that say of which type something is."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lrmult._errors import PatternError, show
from lrmult._libraries import loaded_nnx, module_types
from lrmult._modules import Segments, shared_below, shared_paths, walk


@dataclasses.dataclass(frozen=True, repr=False)
class OfType:
    """The nodes of a model that are of some type, and all below them, by their paths."""

    paths: frozenset[Segments]
    text: str = dataclasses.field(compare=False)

    def __repr__(self) -> str:
        return self.text


def of_type(model: Any, kind: type | tuple[type, ...]) -> OfType:
    """Name the arrays that belong to a type of variable, or to a class of module.

    Args:
        model: a module of NNX or Equinox, or an NNX state (which knows types of variables only).
        kind: a type of NNX variable such as `flax.nnx.LoRAParam`, or a class of module such as
            `flax.nnx.LayerNorm` or `equinox.nn.Linear`, of which all arrays are meant, those of
            modules inside it too; or a tuple of some. Subclasses count.

    Returns:
        A target for a rule: the exact paths that were found in that model.

    Raises:
        PatternError: if `model` is no such model, or `kind` no such type. That nothing of the type
            is there is an UnmatchedRuleError from `compile_rules`, as for any other target.

    Example:
        >>> import lrmult as lm
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs))
        >>> rules = [(lm.of_type(model, nnx.LayerNorm), 2), (..., None)]
        >>> plan = lm.compile_rules(rules, nnx.state(model))
        >>> [leaf.path for leaf in plan.leaves if leaf.trained]
        ['layers/1/bias', 'layers/1/scale']
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    nnx = loaded_nnx()
    known = (*module_types(), nnx.Variable) if nnx is not None else module_types()
    names = " or ".join(getattr(each, "__name__", show(each)) for each in kinds)
    for each in kinds or ((),):
        if not isinstance(each, type) or not issubclass(each, known):
            raise PatternError(
                f"of_type(model, {names}): {show(each)} is neither a type of NNX variable nor a "
                "class of NNX or Equinox modules; for parameters of other libraries write a "
                "pattern, such as '**/LayerNorm_*'"
            )
    inside = [*walk(model)] if isinstance(model, (*known, Mapping)) else []
    if not any(isinstance(value, known) for _, value in inside) and not (
        isinstance(model, Mapping) and not model
    ):
        raise PatternError(
            f"of_type({show(model)}, {names}): that is no module of NNX or Equinox; pass the model "
            "itself (a parameter tree has forgotten what its arrays are of; those of Linen and "
            "Haiku are told by their names: write a pattern, such as '**/LayerNorm_*')"
        )
    found = {path for path, value in inside if isinstance(value, kinds)}
    groups = shared_paths(model)  # the tree may have them elsewhere
    found.update(each for path in [*found] for each in shared_below(path, groups))
    return OfType(frozenset(found), f"of_type({names})")
