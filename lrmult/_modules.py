"""Modules of NNX and Equinox: what they hold, by name, in the order in which it was defined."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from lrmult._levels import children_of, entries
from lrmult._libraries import box_types, is_variable, loaded_equinox, loaded_nnx
from lrmult._paths import is_array

Segments: TypeAlias = tuple[str, ...]

# The metadata of a variable or a field, and the attribute of an NNX module, that hold a multiplier.
# The latter is named like NNX's own, so that the modules that are containers do not list it.
METADATA = "lr_mult"
ATTRIBUTE = "_pytree__lr_mult"


def members(value: Any) -> dict[str, Any]:
    """What a module or a container holds, by name; nothing if it is neither."""
    nnx, equinox = loaded_nnx(), loaded_equinox()
    if nnx is not None and isinstance(value, nnx.List):
        return {str(number): each for number, each in enumerate(value)}
    if nnx is not None and isinstance(value, nnx.Pytree):
        return {name: each for name, each in vars(value).items() if not _is_of_nnx(name)}
    if equinox is not None and isinstance(value, equinox.nn.Shared):
        return {"pytree": restored(value), "where": value.where, "get": value.get}
    if equinox is not None and isinstance(value, equinox.Module):
        names = [field for field in value.__dataclass_fields__ if hasattr(value, field)]
        return {name: getattr(value, name) for name in names}
    if isinstance(value, Mapping):
        return {str(key): each for key, each in value.items()}
    if isinstance(value, list | tuple):
        names = getattr(value, "_fields", [*map(str, range(len(value)))])
        return dict(zip(names, value, strict=True))
    return {}


def restored(shared: Any) -> Any:
    """What `equinox.nn.Shared` holds, with what it has tied at all its places."""
    try:
        return shared()
    except Exception:  # a function that computes something, of what is no array at the moment
        return shared.pytree


def walk(value: Any) -> Iterator[tuple[Segments, Any]]:
    """All that a model holds, with its path: parents first, in the order of definition.

    What it holds at several places is found at each of them.
    """
    return _walk((), value, frozenset())


def _walk(path: Segments, value: Any, above: frozenset[int]) -> Iterator[tuple[Segments, Any]]:
    yield path, value
    if id(value) in above:  # a module that knows the one that holds it
        return
    named = {tuple(name.split("/")): each for name, each in members(value).items()}
    if not named and not isinstance(value, box_types()):
        named = children_of(value)
    for names, each in named.items():
        yield from _walk((*path, *names), each, above | {id(value)})


def shared_paths(model: Any) -> list[list[Segments]]:
    """For each array that a model holds at several places, their paths.

    These are variables of NNX, and what `equinox.nn.Shared` ties to another place.
    """
    equinox = loaded_equinox()
    variables: dict[int, list[Segments]] = {}
    groups: list[list[Segments]] = []
    for path, value in walk(model):
        if is_variable(value):
            variables.setdefault(id(value), []).append(path)
        if equinox is None or not isinstance(value, equinox.nn.Shared):
            continue
        own = {id(each): names for names, each in entries(value.pytree).items()}
        for names, each in walk(restored(value)):
            place = own.get(id(each))
            if is_array(each) and place not in (None, names):
                groups.append([(*path, "pytree", *place), (*path, "pytree", *names)])
    return groups + [paths for paths in variables.values() if len(paths) > 1]


def shared_below(path: Segments, groups: list[list[Segments]]) -> list[Segments]:
    """All paths of those shared arrays that a node holds, there or elsewhere."""
    return [
        each
        for group in groups
        if any(other[: len(path)] == path for other in group)
        for each in group
    ]


def keeps_its_order(value: Any) -> bool:
    """Whether the order in which `members` finds things is certainly that of their definition.

    JAX sorts the keys of a dict, and NNX the attributes of a module whenever it takes it apart and
    puts it together, as in `nnx.jit`, `nnx.grad` and `nnx.clone`. So those that stand in sorted
    order may have stood otherwise. Of a module that has been put together, NNX's own attributes do
    not stand where its class puts them, before all others; then nothing is known of any.
    """
    nnx = loaded_nnx()
    if isinstance(value, Mapping):
        return list(value) != sorted(value, key=str)
    if nnx is None or not isinstance(value, nnx.Pytree) or isinstance(value, nnx.List):
        return True
    names = [name for name in vars(value) if name != ATTRIBUTE]
    own = [name for name in names if _is_of_nnx(name)]
    others = [name for name in names if not _is_of_nnx(name)]
    is_as_built = len(own) < 2 or (names[: len(own)] == own and own != sorted(own))
    return is_as_built and others != sorted(others)


def _is_of_nnx(name: str) -> bool:
    return name.startswith(("_pytree__", "_object__"))
