"""Facts about a model that its parameter tree does not hold."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lrmult._errors import LrmultError, PositionError, RuleError, shorten, show
from lrmult._patterns import escape, literal_path
from lrmult._positions import natural_order


@dataclasses.dataclass(frozen=True)
class Structure:
    """What rules cannot read off a parameter tree. `structure_of` reads it from a model.

    Two are joined by ``|``: where both speak of the order or the layers of one node, the right one
    counts.

    Attributes:
        order: by the path of a node, the names of its children in order. Names that are not in the
            tree are layers without parameters: they count, so that ``-2`` is the last but one
            *layer*. Arrays that a node holds itself need not be named. Children of one numbered
            family (``layers_0``, ``layers_2``) are counted by their numbers all the same; their
            order only tells what stands in the gaps and at the end.
        shared: groups of the paths of one array. A rule on any of them speaks of that array; if
            several rules do, the first in the list wins. One path of a group at least is in the
            tree. (It ties no arrays together: that is the model's business.)
        stacked: the nodes whose layers are stacked, by path, each with the axis along which every
            array below it is stacked (as `flax.linen.scan`, `flax.nnx.scan` and `flax.nnx.vmap`
            make them). There ``"layers[2:4]"`` is a slice of that axis.

    The path of the root is ``""``.

    Raises:
        RuleError: if one of them is not as above. What is wrong with respect to a tree shows in
            `compile_rules`.

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
        >>> chain = {"conv": {"w": jnp.ones(3)}, "dense": {"w": jnp.ones(3)}}
        >>> structure = lm.Structure(order={"": ["conv", "pool", "dense", "softmax"]})
        >>> plan = lm.compile_rules([(-2, 1), (..., None)], chain, structure=structure)
        >>> plan.trainable
        {'conv': {'w': False}, 'dense': {'w': True}}
    """

    order: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    shared: Sequence[Sequence[str]] = ()
    stacked: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # The paths of all nodes of a model from which facts were read, of which a tree may hold a part
    # only. None if nothing was read.
    _read: frozenset[str] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        fields = {
            "order": _read_order(self.order),
            "shared": _read_groups(self.shared),
            "stacked": _read_stacked(self.stacked),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __or__(self, other: "Structure") -> "Structure":
        if not isinstance(other, Structure):
            return NotImplemented
        read = None
        if self._read is not None or other._read is not None:
            by_hand = {*other.order, *other.stacked} - (other._read or frozenset())
            read = (self._read or frozenset()) - by_hand | (other._read or frozenset())
        return Structure(
            order={**self.order, **other.order},
            shared=(*self.shared, *other.shared),
            stacked={**self.stacked, **other.stacked},
            _read=read,
        )

    def is_read(self, path: str) -> bool:
        """Whether what it says of a path was read from a model."""
        return self._read is not None and path in self._read

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # Plans are cached by it: every eager update asks for it.
        return hash((*map(frozenset, (self.order.items(), self.shared, self.stacked.items())),))

    def __reduce__(self) -> Any:
        return Structure, (dict(self.order), self.shared, dict(self.stacked), self._read)

    def __repr__(self) -> str:
        facts = {
            "order": {path: list(names) for path, names in self.order.items()},
            "shared": [list(group) for group in self.shared],
            "stacked": dict(self.stacked),
        }
        return f"Structure({', '.join(f'{name}={fact}' for name, fact in facts.items() if fact)})"


def _read_order(order: Any) -> Mapping[str, tuple[str, ...]]:
    if not isinstance(order, Mapping):
        raise RuleError(
            f"order= is {show(order)}; write the children of each path, as in "
            "Structure(order={'': ['conv', 'pool', 'dense']})"
        )
    read: dict[str, tuple[str, ...]] = {}
    for path, names in order.items():
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not names or not all(isinstance(name, str) for name in names):
            raise RuleError(
                f"order= has {show(names)} for {show(path)}; write a list of the names of its "
                "children"
            )
        if len(set(names)) < len(names):
            raise RuleError(f"order= names a child of {shorten(path)!r} twice: {show(names)}")
        below = [name for name in names if "/" in name]
        if below:
            raise RuleError(
                f"order= names {shorten(below[0])!r} as a child of {shorten(path)!r}; the children "
                "of a child have an entry of their own"
            )
        try:
            family = natural_order(names, path)
        except PositionError as error:
            raise RuleError(f"order= has {show(names)} for {shorten(path)!r}: {error}") from None
        if family is not None and list(names) != family.in_order():
            raise RuleError(
                f"order= has {show(names)} for {shorten(path)!r}, but children of one numbered "
                "family are counted by their numbers; write them in that order, or name them"
            )
        read[_canonical(path, "order")] = tuple(names)
    return MappingProxyType(read)


def _read_groups(shared: Any) -> tuple[tuple[str, ...], ...]:
    """Groups of paths; those that have a path in common are one."""
    example = "Structure(shared=[['embed/embedding', 'head/kernel']])"
    if isinstance(shared, str | Mapping) or not isinstance(shared, Iterable):
        raise RuleError(f"shared= is {show(shared)}; write groups of paths, as in {example}")
    groups: list[dict[str, None]] = []
    for group in shared:
        if isinstance(group, str) or not isinstance(group, Iterable):
            raise RuleError(f"shared= has {show(group)}; write groups of paths, as in {example}")
        paths = dict.fromkeys(_canonical(path, "shared") for path in group)
        if len(paths) < 2:
            raise RuleError(
                f"shared= has {show(group)}; a group has two paths or more of one array"
            )
        for known in [known for known in groups if not known.keys().isdisjoint(paths)]:
            paths = known | paths
            groups.remove(known)
        groups.append(paths)
    return tuple(map(tuple, groups))


def _read_stacked(stacked: Any) -> Mapping[str, int]:
    if not isinstance(stacked, Mapping):
        raise RuleError(
            f"stacked= is {show(stacked)}; write the axis of each path, as in "
            "Structure(stacked={'decoder/layers': 0})"
        )
    for path, axis in stacked.items():
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise RuleError(f"stacked= has {show(axis)} for {show(path)}; an axis is an int")
    return MappingProxyType({_canonical(path, "stacked"): axis for path, axis in stacked.items()})


def read_structure(structure: Any) -> Structure:
    """Facts about a model; None is none."""
    if structure is None:
        return Structure()
    if not isinstance(structure, Structure):
        raise RuleError(
            f"structure= is {show(structure)}; write lrmult.structure_of(model), or "
            "lrmult.Structure(stacked={'path': axis})"
        )
    return structure


def told_of_another(structure: Structure | None) -> Structure:
    """The facts as they may hold of another model too: what is not there is passed over."""
    read = read_structure(structure)
    paths = itertools.chain(read.order, *read.shared, read.stacked)
    return dataclasses.replace(read, _read=frozenset(paths))


@functools.lru_cache(maxsize=4096)
def segments_of(path: Any, fact: str) -> tuple[str, ...]:
    """The names along a path; the root has none."""
    if path == "" and fact != "shared":
        return ()
    if not isinstance(path, str):
        raise RuleError(f"{show(path)} in {fact}= is no path; lrmult.paths(...) lists them")
    try:
        names = literal_path(path)
    except LrmultError as error:
        raise RuleError(f"the path {shorten(path)!r} in {fact}= cannot be read: {error}") from None
    if names is None:
        raise RuleError(
            f"the path {shorten(path)!r} in {fact}= has a wildcard or a position; write the path "
            "of one node in full, as lrmult.paths(...) shows it"
        )
    return names


def _canonical(path: Any, fact: str) -> str:
    """A path as `lrmult.paths` lists it, of the ways in which it may be written."""
    return "/".join(map(escape, segments_of(path, fact)))
