"""Parts of a parameter tree, read and written by the targets of rules."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrmult._errors import LrmultError, RuleError, UnmatchedRuleError, listing, show, spec
from lrmult._levels import PyTree
from lrmult._libraries import box_types
from lrmult._paths import is_array
from lrmult._patterns import literal_path
from lrmult._resolving import Chosen, Resolver
from lrmult._structure import Structure, told_of_another
from lrmult._subarrays import SubArray, dtype_of, kind_of
from lrmult._targets import Target, show_target


def extract(params: PyTree, target: Target, *, structure: Structure | None = None) -> Any:
    """Take out the part of a parameter tree that a target names.

    Args:
        params: a parameter tree, or a module of NNX or Equinox, which tells its own structure.
        target: a target of a rule; see `Rules`.
        structure: as for `compile_rules`.

    Returns:
        * for the name or the position of one node, what stands there: an array, a subtree, a
          module;
        * for what may name several (a wildcard, a slice, a regular expression, a predicate,
          ``...``, `of_type`), a dict from paths to arrays, in the order of the tree;
        * for a part (`rows`, `along`, `neurons`, `elements`, a layer of a stack), the sub-array; a
          dict from paths to sub-arrays if it is part of several. They are indexed as by NumPy: in
          the order of the index, an int drops its axis, and a mask gives a vector.

    Raises:
        UnmatchedRuleError: if the target names nothing.
        LrmultError: all else that `compile_rules` raises for such a target.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"fc": {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.zeros(2)}}
        >>> print(lm.extract(params, lm.rows("fc/w", [2, 0])))
        [[4. 5.]
         [0. 1.]]
        >>> lm.extract(params, "fc/b").shape
        (2,)
        >>> list(lm.extract(params, "**/w"))
        ['fc/w']

    The `NetExtract` of the Wolfram Language.
    """
    call = f"extract(params, {show_target(target)})"
    view = Resolver(params, structure)
    chosen = view.resolve(target, call)
    if chosen.node is not None:
        return view.at(chosen.node)
    if chosen.leaf is not None:
        return chosen.parts[chosen.leaf].of(view.leaves[chosen.leaf])
    return {view.path(leaf): part.of(view.leaves[leaf]) for leaf, part in chosen.parts.items()}


def replace(
    params: PyTree, target: Target, value: Any, *, structure: Structure | None = None
) -> Any:
    """Set the part of a parameter tree that a target names.

    What `extract` returns for a target is what may be put there: ``replace(params, target,
    extract(params, target))`` changes nothing. Values are copied. Their shapes must be those of
    what they replace, and they are cast to its dtypes, within a kind only (floats to floats,
    integers to integers).

    Args:
        params: as for `extract`.
        target: a target of a rule.
        value: an array; for a node with several, a tree with the same paths below it; for what may
            name several, a dict from each path to an array.
        structure: as for `compile_rules`.

    Returns:
        The tree with the new values, or the module: one of NNX is changed in place, as by
        `flax.nnx.update`, and returned; one of Equinox comes back new.

    Raises:
        UnmatchedRuleError: if the target names nothing.
        RuleError: if shapes, dtypes or paths do not fit.
        LrmultError: all else that `compile_rules` raises for such a target.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"conv": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
        >>> params = lm.replace(params, "conv/kernel", jnp.eye(2))
        >>> params = lm.replace(params, lm.rows("conv/bias", -1), 3.0)
        >>> print(params["conv"]["kernel"], params["conv"]["bias"])
        [[1. 0.]
         [0. 1.]] [0. 3.]

    The `NetReplacePart` of the Wolfram Language.
    """
    call = f"replace(params, {show_target(target)}, ...)"
    view = Resolver(params, structure)
    chosen = view.resolve(target, call)
    given = _given(view, chosen, value, call)
    changes = {}
    for leaf, new in given.items():
        array, part = view.leaves[leaf], chosen.parts[leaf]
        reason = part.misfit(array, new)
        if reason:
            raise RuleError(f"{call}: {view.show(leaf, part)} {reason}")
        changes[leaf] = part.put(array, new)
    return view.with_leaves(changes)


def graft(
    params: PyTree,
    source: PyTree,
    targets: Target = ...,
    *,
    structure: Structure | None = None,
) -> tuple[Any, list[tuple[str, str]]]:
    """Transplant what fits from one model into another: a trained trunk into a new net.

    Every array of `params` that a target names is taken from the same path of `source`, if shapes
    agree and dtypes are of one kind. What does not fit is left as it is, and told. So layers that
    no target names come without their trained values.

    Args:
        params: where to put arrays; as for `extract`.
        source: where to take them from: a tree or a module, or a dict from paths to arrays.
        targets: a target of a rule, or a list of some; all arrays if it is left out.
        structure: of `params`, as for `compile_rules`.

    Returns:
        The tree or module with the arrays of the source (a module of NNX is changed in place), and
        what was left, in pairs of a path and a reason: arrays of `params` that kept their values,
        and arrays of `source` that found no place.

    Raises:
        UnmatchedRuleError: if a target names nothing in `params`, or nothing of what it names there
            is in `source`.
        LrmultError: all else that `compile_rules` raises for such a target.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> old = {"trunk": {"a": jnp.ones(2), "b": jnp.ones((2, 2))}, "head": jnp.ones(10)}
        >>> new = {"trunk": {"a": jnp.zeros(2), "b": jnp.zeros((2, 3))}, "head": jnp.zeros(3)}
        >>> new, left = lm.graft(new, old, "trunk")
        >>> print(new["trunk"]["a"], left)
        [1. 1.] [('trunk/b', 'float32[2,3] here, float32[2,2] in the source')]
    """
    view, donor = (
        Resolver(params, structure),
        Resolver(_unescaped(source), told_of_another(structure)),
    )
    changes: dict[int, Any] = {}
    left: dict[str, str] = {}
    for target in targets if isinstance(targets, list) else [targets]:
        call = f"graft(params, source, {show_target(target)})"
        chosen = view.resolve(target, call)
        beside = {leaf: donor.first_of(view.all_names(leaf)) for leaf in chosen.parts}
        try:
            offered, error = donor.resolve(target, f"{call}, in the source").parts, None
        except LrmultError as failed:
            offered, error = {}, failed
        if chosen.parts and set(beside.values()) == {None}:
            example = view.path(next(iter(chosen.parts)))
            raise UnmatchedRuleError(f"{call}: in the source, {donor.why_not(example)}")
        for leaf, part in chosen.parts.items():
            path, known = view.path(leaf), beside[leaf]
            if known is None:
                left[path] = "not in the source"
                continue
            if error and not part.is_whole:
                raise error
            value = donor.leaves[known]
            if not part.is_whole:
                value = offered.get(known, SubArray()).of(value)
            array = changes.get(leaf, view.leaves[leaf])
            is_shape, was_shape = (isinstance(e, jax.ShapeDtypeStruct) for e in (value, array))
            if is_shape and not was_shape:
                raise RuleError(
                    f"{call}: in the source, {path!r} is a ShapeDtypeStruct, which has no numbers"
                )
            if part.misfit(array, value):
                here = spec(part.shape(array), dtype_of(array))
                left[path] = f"{here} here, {spec(np.shape(value), dtype_of(value))} in the source"
            else:
                changes[leaf] = part.put(array, value)
        for known in offered:
            if known not in beside.values() and view.first_of(donor.all_names(known)) is None:
                left[donor.path(known)] = "only in the source"
    return view.with_leaves(changes), list(left.items())


def _given(view: Resolver, chosen: Chosen, value: Any, call: str) -> dict[int, Any]:
    """The new value of each array.

    Raises:
        RuleError: if it is not clear which is meant for which.
    """
    if isinstance(value, box_types()):
        [value] = jax.tree.leaves(value) or [value]
    is_one = is_array(value)
    if chosen.leaf is not None:
        return {leaf: _as_array(value, view.leaves[leaf], call) for leaf in chosen.parts}
    if is_one and len(chosen.parts) > 1:
        raise RuleError(
            f"{call}: the value is one array, and there are {len(chosen.parts)} to be set: "
            f"{listing(map(view.path, chosen.parts), 3)}"
        )
    given: dict[tuple[str, ...], Any] = {}
    if chosen.node is not None:
        inside = Resolver(value, None)
        given = {names: inside.leaves[leaf] for names, leaf in inside.below(0).items()}
        wanted = view.below(chosen.node)
        # What another path leads to is in a module once more, but not in a tree.
        for names in [*wanted]:
            if names not in given and not view.is_there((*view.names_at(chosen.node), *names)):
                del wanted[names]
    else:
        wanted = {view.names(leaf): leaf for leaf in chosen.parts}
        if isinstance(value, Mapping):
            given = {view.names_of(path): each for path, each in value.items()}
    if wanted.keys() != given.keys() and len(chosen.parts) == 1 and not isinstance(value, Mapping):
        return {leaf: _as_array(value, view.leaves[leaf], call) for leaf in chosen.parts}
    if wanted.keys() != given.keys():
        missing, unknown = wanted.keys() - given.keys(), given.keys() - wanted.keys()
        seen = [
            f"{what} {listing(sorted(map('/'.join, names)), 3)}"
            for what, names in (("nothing for", missing), ("no place for", unknown))
            if names
        ]
        raise RuleError(
            f"{call}: the value has {' and '.join(seen)}; pass what extract(params, "
            f"{call.partition(', ')[2].removesuffix(', ...)')}) returns, with other numbers in it"
        )
    found = {
        leaf: _as_array(given[names], view.leaves[leaf], call) for names, leaf in wanted.items()
    }
    for leaf in [*found]:
        found = dict.fromkeys(view.mates(leaf), found[leaf]) | found
    return found


def _as_array(value: Any, array: Any, call: str) -> Any:
    """An array, or what is as good as one. Integers without a dtype take that of the array.

    Raises:
        RuleError: if it is none.
    """
    if hasattr(value, "shape") and is_array(value):
        return value
    try:
        found = np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        found = np.asarray(None)
    if found.dtype.kind not in "biufc":
        raise RuleError(f"{call}: {show(value)} is no array")
    dtype = dtype_of(array)
    fits = kind_of(dtype) in ("float", "complex") or (
        kind_of(dtype) == "int" and bool(np.all(found == found.astype(dtype)))
    )
    return found.astype(dtype) if found.dtype.kind in "iu" and fits else found


def _unescaped(source: PyTree) -> PyTree:
    """A dict from paths to arrays as a tree: in its keys, names stand as rules write them."""
    if not isinstance(source, dict) or not any("\\" in str(key) for key in source):
        return source
    names = {key: literal_path(str(key)) for key in source}
    return {"/".join(names[key] or (str(key),)): value for key, value in source.items()}
