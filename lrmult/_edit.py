"""Parts of a parameter tree, read and written by the targets of rules."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrmult._checks import mistakes
from lrmult._claims import Matched
from lrmult._errors import LrmultError, RuleError, UnmatchedRuleError, listing, show
from lrmult._matching import find, match
from lrmult._modules import is_module, members
from lrmult._paths import (
    ParamTree,
    PyTree,
    box_types,
    children_of,
    is_array,
    is_nnx_module,
    loaded_nnx,
)
from lrmult._patterns import At, Indexed, Pattern, Span, escape
from lrmult._regions import Flags, Index
from lrmult._rules import Rule, Rules
from lrmult._structure import (
    Structure,
    add_structure,
    literal_path,
    read_structure,
    told_of_another,
)
from lrmult._structure_of import structure_of
from lrmult._subarrays import Places, SubArray, dtype_of, kind_of, spec
from lrmult._suggest import explain_unmatched
from lrmult._targets import Elements, Target, is_wild, show_target


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
    view = _View(params, structure)
    chosen = view.choose(target, call)
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
    view = _View(params, structure)
    chosen = view.choose(target, call)
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
    view, donor = _View(params, structure), _View(_unescaped(source), told_of_another(structure))
    changes: dict[int, Any] = {}
    left: dict[str, str] = {}
    for target in targets if isinstance(targets, list) else [targets]:
        call = f"graft(params, source, {show_target(target)})"
        chosen = view.choose(target, call)
        beside = {leaf: donor.first_of(view.all_names(leaf)) for leaf in chosen.parts}
        try:
            offered, error = donor.choose(target, f"{call}, in the source").parts, None
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


@dataclasses.dataclass
class _Chosen:
    """What a target names in a tree.

    Attributes:
        parts: the arrays, by leaf, each with what of it is meant.
        leaf: the one array that it names, if it does that, or of which it names a part. That array
            may be at several leaves.
        node: the one node with arrays below that it names, if it does that.
    """

    parts: dict[int, SubArray]
    leaf: int | None = None
    node: int | None = None


class _View:
    """A tree or a module, as a target is resolved in it."""

    def __init__(self, params: PyTree, structure: Structure | None) -> None:
        structure = read_structure(structure)
        if is_module(params):
            structure = structure_of(params) | structure
        self._given = params
        self._state = loaded_nnx().state(params) if is_nnx_module(params) else params
        self.leaves = jax.tree.leaves(self._state)
        self._tree = ParamTree(self._state)
        add_structure(self._tree, structure)

    def choose(self, target: Target, call: str) -> _Chosen:
        """Resolve a target.

        Raises:
            LrmultError: if that is a mistake; `call` is how messages name it.
        """
        tree = self._tree
        try:
            rules = Rules([Rule(target, 1.0)])
            matches = match([rules[0].selector], tree)
            matched = Matched(rules, tree, matches)
            for _, error in mistakes(rules, tree, matches, matched, matched.claims()):
                raise error
            leaves = [leaf for leaf, row in enumerate(matched.rows) if row]
            selector, restrictions = rules[0].selector, rules[0].restrictions
            if not leaves and not (isinstance(selector, Pattern) and selector.is_everything):
                raise UnmatchedRuleError(explain_unmatched(rules[0], tree))
        except LrmultError as error:
            raise type(error)(f"{call}: {error}") from error.__cause__
        nodes = find(selector, tree) if isinstance(selector, Pattern) else []
        has_span = isinstance(selector, Pattern) and _has_span(selector)
        parts = {
            leaf: self._part(leaf, self._layers(leaf, nodes), restrictions, matched, has_span)
            for leaf in leaves
        }
        if not nodes or is_wild(selector) or has_span:
            return _Chosen(parts)
        [node] = nodes
        if node in self._ends:
            return _Chosen(parts, leaf=self._ends[node])
        if not restrictions and all(part.is_whole for part in parts.values()):
            return _Chosen(parts, node=node)
        return _Chosen(parts, leaf=leaves[0] if len(leaves) == 1 else None)

    def _layers(self, leaf: int, nodes: Sequence[int]) -> list[dict[int, int]]:
        """The layers of stacks that some nodes stand for, of an array; none if it is all of it.

        Each is an index for some of its axes.
        """
        tree = self._tree
        copies = tree.slices.get(leaf, {})
        line = tree.line(tree.places[leaf] or 0)
        if not copies or any(node in line for node in nodes):
            return []
        found = []
        for node in nodes:
            inside = [set(at.items()) for copy, at in copies.items() if node in tree.line(copy)]
            if inside:
                found.append(dict(set.intersection(*inside)))
        return found

    def _part(
        self,
        leaf: int,
        layers: Sequence[Mapping[int, int]],
        restrictions: Sequence[Any],
        matched: Matched,
        has_span: bool,
    ) -> SubArray:
        shape = self._tree.shapes[leaf]
        places: dict[int, Places] = {}
        mask = None
        if layers:
            at = {axis: sorted({each.get(axis, -1) for each in layers}) for axis in layers[0]}
            if len(layers) == math.prod(map(len, at.values())) and not any(
                -1 in p for p in at.values()
            ):
                places = {
                    axis: p[0] if len(p) == 1 and not has_span else p for axis, p in at.items()
                }
            else:  # layers of stacks in stacks that are no rectangle
                mask = np.zeros(shape, np.bool_)
                for each in layers:
                    mask[tuple(each.get(axis, slice(None)) for axis in range(len(shape)))] = True
        for restriction in restrictions:
            if isinstance(restriction, Elements):
                more = np.ones(shape, np.bool_)
                if restriction.region is not None:
                    more = restriction.region.dense(shape)
                mask = more if mask is None else mask & more
                continue
            axis = matched.axis_of(leaf, restriction, 0)
            places[axis] = _both(places.get(axis), _places(restriction.index, shape[axis]))
        if mask is not None:
            for axis, wanted in places.items():
                vector = np.zeros(shape[axis], np.bool_)
                vector[wanted] = True
                mask = mask & vector.reshape([-1 if a == axis else 1 for a in range(len(shape))])
            return SubArray(mask=mask)
        return SubArray(places)

    def why_not(self, path: str) -> str:
        """Why a path leads to nothing."""
        return explain_unmatched(Rule(path, 1.0), self._tree) if path else "it is no bare array"

    def at(self, node: int) -> Any:
        """What stands at a node with arrays below it."""
        below = any(node in self._tree.line(place) for _, place in self._tree.arrays())
        if not below and not is_module(self._given):  # only other paths of arrays lead there
            inside = self.below(node).items()
            return {"/".join(map(escape, names)): self.leaves[leaf] for names, leaf in inside}
        return _descend(self._given, self.names_at(node))

    @functools.cached_property
    def _ends(self) -> dict[int, int]:
        """The nodes at which arrays stand, and the leaf of each."""
        aliases = self._tree.aliases.items()
        found = {node: leaf for leaf, nodes in aliases for node in nodes}
        return found | {place: leaf for leaf, place in self._tree.arrays()}

    def names_at(self, node: int) -> tuple[str, ...]:
        """The names along the path of a node."""
        return tuple(self._tree.names[each] for each in self._tree.line(node)[1:])

    def names(self, leaf: int) -> tuple[str, ...]:
        """The names along the path of an array."""
        return self.names_at(self._tree.places[leaf] or 0)

    def all_names(self, leaf: int) -> list[tuple[str, ...]]:
        """The names along its path and along its other paths."""
        return [self.names(leaf), *map(self.names_at, self._tree.aliases.get(leaf, ()))]

    def path(self, leaf: int) -> str:
        """The path of an array."""
        return self._tree.text(self._tree.places[leaf] or 0)

    def below(self, node: int) -> dict[tuple[str, ...], int]:
        """The arrays below a node, by the names on the way."""
        depth = len(self.names_at(node))
        return {
            self.names_at(end)[depth:]: leaf
            for end, leaf in self._ends.items()
            if node in self._tree.line(end)
        }

    def is_there(self, names: tuple[str, ...]) -> bool:
        """Whether an array stands at a path, or at another of its paths only."""
        return self._tree.node_at(names) in self._tree.places

    def mates(self, leaf: int) -> list[int]:
        """The other leaves that hold the same array."""
        return [
            other for other, nodes in self._tree.aliases.items() if self._tree.places[leaf] in nodes
        ]

    def names_of(self, path: Any) -> tuple[str, ...]:
        """The names along the first path of the array that a path leads to."""
        leaf = self._leaves_by_path.get(path)
        return (str(path),) if leaf is None else self.names(leaf)

    def first_of(self, paths: Sequence[tuple[str, ...]]) -> int | None:
        """The array at the first of some paths that leads to one; None if none does."""
        nodes = map(self._tree.node_at, paths)
        return next((self._ends[node] for node in nodes if node in self._ends), None)

    @functools.cached_property
    def _leaves_by_path(self) -> dict[str, int]:
        return {self._tree.text(end): leaf for end, leaf in self._ends.items()}

    def show(self, leaf: int, part: SubArray) -> str:
        """How a message shows a part of an array."""
        seen = self._tree.show(leaf)
        if part.is_whole:
            return seen
        return f"of {seen}, a part of shape {list(part.shape(self.leaves[leaf]))}"

    def with_leaves(self, changes: Mapping[int, Any]) -> Any:
        """The tree or module with other arrays."""
        leaves = [changes.get(leaf, array) for leaf, array in enumerate(self.leaves)]
        state = jax.tree.unflatten(jax.tree.structure(self._state), leaves)
        if self._state is self._given:
            return state
        loaded_nnx().update(self._given, state)
        return self._given


def _given(view: _View, chosen: _Chosen, value: Any, call: str) -> dict[int, Any]:
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
        inside = _View(value, None)
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


def _places(index: Index, size: int) -> Places:
    """The places that an index means, in its order."""
    if isinstance(index, Flags):
        return np.flatnonzero(index.vector).tolist()
    if isinstance(index, Span):
        return list(range(size)[slice(*index)])
    return index % size if isinstance(index, int) else [place % size for place in index]


def _both(known: Places | None, more: Places) -> Places:
    """The places that both mean, in the order of the first."""
    if known is None:
        return more
    if isinstance(known, int) or isinstance(more, int):
        return known if isinstance(known, int) else more
    return [place for place in known if place in more]


def _has_span(pattern: Pattern) -> bool:
    return any(
        isinstance(step, At | Indexed) and isinstance(step.position, Span) for step in pattern.steps
    )


def _descend(value: Any, names: tuple[str, ...]) -> Any:
    """What stands at a path; a dict, where that is within a key, or within several."""
    found = list(_stand(value, names))
    if len(found) == 1 and not found[0][0]:
        return found[0][1]
    merged = {}
    for rest, each in found:
        inside = {rest: each} if rest else _inside(each)
        merged.update({"/".join(segments): child for segments, child in inside.items()})
    return merged


def _stand(value: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All that a path leads to or into, with what is left of its key."""
    if not names:
        yield (), value
        return
    for segments, child in _inside(value).items():
        if names[: len(segments)] == segments:
            yield from _stand(child, names[len(segments) :])
        elif segments[: len(names)] == names:
            yield segments[len(names) :], child


def _inside(value: Any) -> dict[tuple[str, ...], Any]:
    if is_module(value):  # which may hold an array or a module that its tree has elsewhere
        return {tuple(name.split("/")): each for name, each in members(value).items()}
    return children_of(value)
