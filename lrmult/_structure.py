"""Facts about a model that its parameter tree does not hold."""

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lrmult._errors import AxisError, LrmultError, RuleError, shorten, show
from lrmult._paths import ParamTree
from lrmult._patterns import Names, parse


@dataclasses.dataclass(frozen=True)
class Structure:
    """What rules cannot read off a parameter tree.

    Attributes:
        stacked: the nodes whose layers are stacked, by path, each with the axis along which every
            array below it is stacked (as `flax.linen.scan`, `flax.nnx.scan` and `flax.nnx.vmap`
            make them). There ``"layers[2:4]"`` is a slice of that axis. The path of the root is
            ``""``.

    Raises:
        RuleError: if it is no mapping from paths to ints.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"layers": {"kernel": jnp.ones((12, 8, 8))}, "head": jnp.ones((8, 2))}
        >>> structure = lm.Structure(stacked={"layers": 0})
        >>> print(lm.compile_rules([("layers[:4]", None)], params, structure=structure))
        parameters   arrays        size                        multiplier   rule
        -----------------------------------------------------------------------------------
        head         f32[8,2]        16                                 1   none
        layers       f32[12,8,8]    768   layers 0-3 of 12 frozen; rest 1   0: 'layers[:4]'
        <BLANKLINE>
        2 arrays, 784 parameters: 528 train, 256 frozen
    """

    stacked: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.stacked, Mapping):
            raise RuleError(
                f"stacked= is {show(self.stacked)}; write the axis of each path, as in "
                "Structure(stacked={'decoder/layers': 0})"
            )
        for path, axis in self.stacked.items():
            if isinstance(axis, bool) or not isinstance(axis, int):
                raise RuleError(f"stacked= has {show(axis)} for {show(path)}; an axis is an int")
            _segments(path)
        object.__setattr__(self, "stacked", MappingProxyType(dict(self.stacked)))

    def __hash__(self) -> int:
        return hash(frozenset(self.stacked.items()))

    def __reduce__(self) -> Any:
        return Structure, (dict(self.stacked),)

    def __repr__(self) -> str:
        return f"Structure(stacked={dict(self.stacked)!r})"


def read_structure(structure: Any) -> Structure:
    """Facts about a model; None is none."""
    if structure is None:
        return Structure()
    if not isinstance(structure, Structure):
        raise RuleError(
            f"structure= is {show(structure)}; write lrmult.Structure(stacked={{'path': axis}})"
        )
    return structure


@functools.lru_cache(maxsize=1024)
def _segments(path: Any) -> tuple[str, ...]:
    """The names along a path; the root has none."""
    if path == "":
        return ()
    if not isinstance(path, str):
        raise RuleError(f"{show(path)} in stacked= is no path; lrmult.paths(...) lists them")
    try:
        steps = parse(path).steps
    except LrmultError as error:
        raise RuleError(f"the path {shorten(path)!r} in stacked= cannot be read: {error}") from None
    names = [step for step in steps if isinstance(step, Names) and step.is_literal]
    if len(names) < len(steps):
        raise RuleError(
            f"the path {shorten(path)!r} in stacked= has a wildcard or a position; write the path "
            "of one node in full, as lrmult.paths(...) shows it"
        )
    return tuple(name.alternatives[0][0] for name in names)


def add_structure(tree: ParamTree, structure: Structure) -> None:
    """Add the facts to a tree.

    Raises:
        RuleError: if there is no such node.
        AxisError: if the arrays below a node are not all stacked along its axis.
    """
    found: dict[int, tuple[str, int]] = {}
    for path, axis in structure.stacked.items():
        node = tree.node_at(_segments(path))
        if node is not None:
            found[node] = path, axis
        elif not _may_be_cut_out(tree, _segments(path)):
            known = [tree.text(each) for each in tree.nodes[1:]]
            near = difflib.get_close_matches(path, known, 1)
            seen = f"structure= says that {shorten(path)!r} is stacked, but nothing in the tree has"
            raise RuleError(
                f"{seen} that path; did you mean {shorten(near[0])!r}?"
                if near
                else f"{seen} that path; lrmult.paths(params) lists them"
            )
    below: dict[int, list[int]] = {node: [] for node in found}  # -> leaves
    for leaf, place in tree.arrays() if found else ():
        for node in tree.line(place):
            if node in below:
                below[node].append(leaf)
    taken: dict[tuple[int, int], str] = {}
    for node in sorted(found, reverse=True):  # a node's number is above those of its parents
        path, axis = found[node]
        for leaf in below[node]:
            other = taken.setdefault((leaf, axis % max(len(tree.shapes[leaf]), 1)), path)
            if other != path:
                raise AxisError(
                    f"structure= says of both {shorten(path)!r} and {shorten(other)!r} that axis "
                    f"{axis} of {tree.show(leaf)} is that of their layers; axes are those of the "
                    "array as it stands in the tree"
                )
        if below[node]:
            tree.stack(node, axis, _layers(tree, below[node], path, axis))
        else:  # all that was there has been cut out, and its layers with it
            tree.holes.add(node)
            tree.cut.add(node)


def _may_be_cut_out(tree: ParamTree, segments: tuple[str, ...]) -> bool:
    return any(tree.node_at(segments[:depth]) in tree.holes for depth in range(len(segments) + 1))


def _layers(tree: ParamTree, leaves: list[int], path: str, axis: int) -> int:
    """The number of layers, on which all arrays below a node must agree."""
    sizes: dict[int, int] = {}  # size -> the first leaf that has it
    for leaf in leaves:
        shape = tree.shapes[leaf]
        if not -len(shape) <= axis < len(shape):
            raise AxisError(
                f"structure= says that all below {shorten(path)!r} is stacked along axis {axis}, "
                f"which {tree.show(leaf)} does not have; name the nodes that are stacked"
            )
        sizes.setdefault(shape[axis], leaf)
    if len(sizes) > 1:
        (one, first), (other, second), *_ = sizes.items()
        raise AxisError(
            f"structure= says that all below {shorten(path)!r} is stacked along axis {axis}, but "
            f"{tree.show(first)} has {one} layers there and {tree.show(second)} has {other}; name "
            "the axis or the nodes that are meant"
        )
    return next(iter(sizes))
