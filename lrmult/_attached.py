"""Multipliers that a model carries with it."""

import functools
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import jax

from lrmult._errors import LrmultError, MultiplierError, RuleError, shorten, show
from lrmult._levels import PyTree
from lrmult._libraries import (
    box_types,
    is_linen_module,
    is_module,
    is_nnx_module,
    is_variable,
    loaded_equinox,
)
from lrmult._modules import (
    ATTRIBUTE,
    METADATA,
    Segments,
    shared_below,
    shared_paths,
    walk,
)
from lrmult._multipliers import Multiplier, is_array, read_multiplier, show_multiplier
from lrmult._patterns import escape
from lrmult._plan import cached_plan
from lrmult._rules import Rule, Rules
from lrmult._structure import Structure

T = TypeVar("T")


def attach(target: T, multiplier: Any) -> T:
    """Give a part of a model a multiplier of its own, which stays when it is nested in another.

    Nothing reads it by itself: `attached_rules` makes rules of what a model carries, to be added
    after those of the call, and ``init`` of `scale_by_rules` and `wrap` raises if it sees one that
    no rule covers.

    * A **module of NNX** keeps it for all arrays in it. It stands on the module alone, so what is
      attached to something inside counts before it, whichever was attached first.
    * A **variable of NNX** keeps it as its metadata ``lr_mult``. So do variables that are made with
      it: ``nnx.Param(x, lr_mult=0.1)``, ``nnx.Linear(..., kernel_metadata={"lr_mult": None})``, an
      initializer in ``nnx.with_metadata(init, lr_mult=0.1)``. (NNX does not carry metadata that is
      set inside `nnx.jit` to the model outside.)
    * An **initializer of Linen** becomes one whose array is boxed, as with
      `flax.linen.with_partitioning` (inside or outside of it).
    * In **Equinox** it stands in the class: ``weight: Array = eqx.field(metadata={"lr_mult":
      0.1})``, for an array or a module.

    Args:
        target: a module or a variable of NNX, or an initializer for Linen.
        multiplier: a number, None for frozen, or a schedule; in place of one attached before.

    Returns:
        The module or variable itself, which was changed in place; or a new initializer.

    Raises:
        MultiplierError: if the multiplier is no number, None or schedule.
        RuleError: if nothing can be attached to `target`.

    Example:
        >>> import lrmult as lm
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> trunk = lm.attach(nnx.Linear(4, 4, rngs=rngs), None)
        >>> model = nnx.Sequential(trunk, nnx.relu, nnx.Linear(4, 2, rngs=rngs))
        >>> lm.attached_rules(model)
        optional([('layers/0', None)])
    """
    multiplier = _read(multiplier, "attach(..., multiplier)")
    if is_variable(target):
        variable: Any = target
        variable.set_metadata(**{METADATA: multiplier})
        return target
    if is_nnx_module(target):
        setattr(target, ATTRIBUTE, multiplier)
        return target
    if is_module(target):
        raise RuleError(
            f"{type(target).__name__} is a module of Equinox, which is never changed; write the "
            "multiplier in its class, as in weight: Array = eqx.field(metadata={'lr_mult': 0.1}), "
            "or write a rule"
        )
    is_tree = not jax.tree_util.all_leaves([target])  # as a module that can be called is
    if isinstance(target, type) or not callable(target) or is_tree or is_linen_module(target):
        raise RuleError(
            f"nothing can be attached to {show(target)}; pass a module or a variable of NNX, or an "
            "initializer for Linen, as in nn.Dense(4, kernel_init=lrmult.attach(init, 0.1))"
        )
    return cast(T, _boxing(target, multiplier))


def _boxing(initializer: Any, multiplier: Multiplier) -> Any:
    @functools.wraps(initializer)
    def init(*args: Any, **kwargs: Any) -> Any:
        from lrmult._linen import Attached

        return Attached.around(initializer(*args, **kwargs), multiplier)

    return init


def attached_rules(model_or_params: Any) -> Rules:
    """Make rules of the multipliers that a model carries.

    They are optional (see `optional`) and stand innermost first. Added to the rules of a call they
    count after them: ``rules + attached_rules(model)``.

    Args:
        model_or_params: a module of NNX or Equinox, an NNX state (which carries what is attached to
            variables), a tree of Linen's with its boxes, or a tree that holds such things.

    Returns:
        The rules; none if nothing is attached.

    Raises:
        MultiplierError: if something other than a number, None or a schedule is attached.
        RuleError: if it is a module of Linen, whose parameters carry its multipliers.

    Example:
        >>> import jax, lrmult as lm
        >>> from flax import nnx
        >>> layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0), bias_metadata={"lr_mult": 2})
        >>> rules = [("kernel", 0.5)] + lm.attached_rules(lm.attach(layer, None))
        >>> rules
        Rules([('kernel', 0.5)]) + optional([('bias', 2.0), (..., None)])
        >>> for leaf in lm.compile_rules(rules, nnx.state(layer)).leaves:
        ...     print(leaf.path, leaf.multiplier)
        bias 2.0
        kernel 0.5

    What the Wolfram Language's option `LearningRateMultipliers` of a layer is, and what reading and
    setting it by `NetExtract` and `NetReplacePart` are there.
    """
    if is_linen_module(model_or_params):
        raise RuleError(
            f"the Linen module {type(model_or_params).__name__} carries its multipliers in its "
            "parameters; write attached_rules(params), or attached_rules(jax.eval_shape(...)) of "
            "its init"
        )
    found = sorted(_attached(model_or_params), key=lambda each: (-len(each[0]), each[0]))
    rules: dict[Segments, Rule] = {}
    for path, multiplier, others in found:
        for each in (path, *others):
            target = "/".join(map(escape, each)) if each else ...
            rules.setdefault(each, Rule(target, multiplier, optional=True))
    return Rules(rules.values())


def check_covered(rules: Rules, params: PyTree, structure: Structure, strict: bool) -> None:
    """See that no multiplier in a tree of parameters is dropped without a word.

    Raises:
        RuleError: if an array carries one other than 1, and no rule speaks of it.
    """
    carried = attached_rules(params)
    if not carried:
        return
    plan = cached_plan(rules, params, structure, strict)
    of_carried = cached_plan(carried, params, structure, strict)
    for leaf, (pieces, meant) in enumerate(zip(plan.claims, of_carried.claims, strict=True)):
        multipliers = [carried[piece.rule].multiplier for piece in meant if piece.rule is not None]
        if any(piece.rule is None for piece in pieces) and multipliers not in ([], [1.0]):
            path = plan.tree.path(leaf)
            raise RuleError(
                f"{shorten(path)!r} carries the multiplier {show_multiplier(multipliers[0])}, but "
                "no rule speaks of it; write rules + lrmult.attached_rules(params), with the model "
                "or its parameters, or give it a rule of its own"
            )


def _attached(model: Any) -> Iterator[tuple[Segments, Multiplier, list[Segments]]]:
    """Paths, the multipliers attached there, and other paths of arrays that are meant.

    An array that is shared may stand below what carries a multiplier, and have another path.
    """
    equinox = loaded_equinox()
    found: list[tuple[Segments, Any]] = []
    for path, value in walk(model):
        if is_variable(value):
            metadata = value.get_metadata()
            if METADATA in metadata:
                found.append((path, metadata[METADATA]))
        elif is_nnx_module(value):
            if ATTRIBUTE in vars(value):
                found.append((path, vars(value)[ATTRIBUTE]))
        elif equinox is not None and isinstance(value, equinox.Module):
            for name, field in value.__dataclass_fields__.items():
                if METADATA in field.metadata:
                    found.append(((*path, name), field.metadata[METADATA]))
        else:
            found += [(path, multiplier) for multiplier in _in_boxes(value)]
    groups = shared_paths(model) if found else []
    for path, multiplier in found:
        others = [other for other in shared_below(path, groups) if other[: len(path)] != path]
        yield path, _read(multiplier, f"what is attached at {'/'.join(path)!r}"), others


def _in_boxes(value: Any) -> Iterator[Any]:
    """The multiplier that a box of Linen around an array carries, if there is one."""
    while isinstance(value, box_types()):
        # What came from NNX by way of its bridge has the metadata of a variable.
        carried = getattr(value, "metadata", None) or vars(value)
        if METADATA in carried:
            yield carried[METADATA]
            return
        value = getattr(value, "value", None)


def _read(multiplier: Any, what: str) -> Multiplier:
    try:
        read = read_multiplier(multiplier)
        if is_array(read):
            raise MultiplierError("an array is no part of a model's structure; write a rule for it")
    except LrmultError as error:
        raise type(error)(f"{what}: {error}") from None
    return read
