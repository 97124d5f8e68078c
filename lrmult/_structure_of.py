"""Facts about a model, read from the model."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from lrmult._errors import PositionError, RuleError, show
from lrmult._libraries import (
    is_linen_module,
    is_module,
    is_variable,
    loaded_equinox,
    loaded_nnx,
)
from lrmult._modules import Segments, keeps_its_order, members, shared_paths, walk
from lrmult._patterns import escape
from lrmult._positions import natural_order
from lrmult._structure import Structure


def structure_of(model: Any, *args: Any, **kwargs: Any) -> Structure:
    """Read from a model what its parameter tree does not tell.

    * **Order.** Of modules of NNX and Equinox, the order in which their layers are defined; of
      those of Linen, the order in which they are called. Layers without parameters count: as
      attributes if they are modules (a dropout layer, no function), as entries of a list or a
      ``Sequential`` always. Arrays that a module holds itself are no layers. Children of one
      numbered family are counted by their numbers (those of Linen by order of construction, which
      nested calls can turn around: ``Dense(2)(relu(Dense(4)(x)))`` calls ``Dense_1`` first).
    * **Shared arrays.** Modules and variables of NNX that are held at several places, submodules
      that a Linen module gets as an attribute or calls as such twice, and `equinox.nn.Shared`.
    * **Stacked layers.** Those of `flax.linen.scan` and `flax.linen.vmap`; those of `flax.nnx.vmap`
      and `equinox.filter_vmap` where the layers in them tell it, by arrays of one axis more than
      they were made for. If that axis is one of several of one size, it is not told.

    Of an NNX module whose attributes stand in sorted order (and differ in more than a number) no
    order is told: NNX itself sorts them, in `nnx.jit`, `nnx.grad` or `nnx.clone`, on the original
    object too. Read the structure of a freshly built model, keep layers in a list, or say the
    order by hand: ``structure_of(model) | Structure(order={"": [...]})``.

    Args:
        model: a module of NNX or Equinox, or of Linen.
        *args: for a Linen module, the arguments of its ``init``: random keys, and example inputs
            or their shapes.
        **kwargs: keyword arguments of its ``init``.

    Returns:
        The structure. Its paths are those of the model (for Linen: of ``variables["params"]``).
        Unlike facts that are given by hand, those that speak of something that is not in a tree
        are passed over there: optimizers may see a part of a model.

    Raises:
        RuleError: if `model` is no module, or a Linen module comes without arguments.

    Example:
        >>> import lrmult as lm
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(
        ...     nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs), nnx.softmax
        ... )
        >>> structure = lm.structure_of(model)
        >>> structure.order["layers"]
        ('0', '1', '2', '3')
        >>> params = nnx.state(model, nnx.Param)
        >>> plan = lm.compile_rules([("layers[-2]", 1), (..., None)], params, structure=structure)
        >>> [leaf.path for leaf in plan.leaves if leaf.trained]
        ['layers/2/bias', 'layers/2/kernel']
    """
    if is_module(model):
        if args or kwargs:
            raise RuleError(
                f"structure_of({show(type(model))}, ...) takes the model alone; inputs are for "
                "Linen modules"
            )
        return _structure_of_module(model)
    if is_linen_module(model):
        if not args:
            raise RuleError(
                f"the Linen module {type(model).__name__} shows its layers when it is called: "
                "write structure_of(module, jax.random.key(0), *example_inputs)"
            )
        from lrmult import _linen

        return make_structure(*_linen.facts(model, args, kwargs))
    raise RuleError(
        f"{show(model)} is no module of NNX, Linen or Equinox; a parameter tree does not tell its "
        "structure: pass the model, or write lrmult.Structure(order=..., shared=..., stacked=...)"
    )


def make_structure(
    order: Mapping[Segments, Sequence[str]],
    groups: Iterable[Iterable[Segments]],
    stacked: Mapping[Segments, int],
    nodes: Iterable[Segments],
) -> Structure:
    """The structure that was read from a model, by the segments of paths.

    Args:
        order: as of `Structure`.
        groups: those of shared arrays.
        stacked: as of `Structure`.
        nodes: all that the model has.
    """
    ordered = {}
    for path, names in order.items():
        try:
            family = natural_order(names, "")
        except PositionError:  # two have one number: then positions say so
            continue
        if family is not None:
            names = family.in_order()
        ordered[_text(path)] = names
    shared = [[_text(path) for path in group] for group in groups]
    axes = {_text(path): axis for path, axis in stacked.items()}
    known = map(_text, nodes)
    read = frozenset((*ordered, *itertools.chain.from_iterable(shared), *axes, *known))
    return Structure(order=ordered, shared=shared, stacked=axes, _read=read)


def _text(path: Segments) -> str:
    return "/".join(map(escape, path))


def _structure_of_module(model: Any) -> Structure:
    order: dict[Segments, list[str]] = {}
    nodes: list[Segments] = []
    for path, value in walk(model):
        nodes.append(path)
        names = _layers(value)
        if names:
            order[path] = names
    stacked, unclear = _stacks(model)
    order = {path: names for path, names in order.items() if path not in unclear}
    return make_structure(order, shared_paths(model), stacked, nodes)


def _layers(value: Any) -> list[str]:
    """The names of the layers that something holds, if their order is known."""
    found = members(value)
    layers = [name for name, each in found.items() if _holds_modules(each)]
    if not layers:
        return []
    if isinstance(value, list | tuple) or all(name.isdecimal() for name in found):
        return list(found)  # functions are layers there
    if len(layers) == 1 or keeps_its_order(value) or _is_family(layers):
        return layers
    return []


def _is_family(names: Sequence[str]) -> bool:
    try:
        return natural_order(names, "") is not None
    except PositionError:
        return False


def _holds_modules(value: Any) -> bool:
    if is_module(value):
        return True
    return isinstance(value, list | tuple | Mapping) and any(
        map(_holds_modules, members(value).values())
    )


def _stacks(model: Any) -> tuple[dict[Segments, int], set[Segments]]:
    """The modules whose layers are stacked along an axis, as far as the layers in them tell.

    Returns:
        The axes of those that do; and those of which it is not clear what a position counts, since
        the layers in them have more axes than they were made for.
    """
    shapes: dict[Segments, tuple[int, ...]] = {}
    hints: dict[Segments, set[int]] = {}  # of arrays: what may be the axis of a stack
    larger: set[Segments] = set()  # arrays with more axes than they were made for
    is_layer: dict[Segments, bool] = {}  # of modules: whether a library has them, as linear layers
    for path, value in walk(model):
        if is_module(value):
            made_for = _made_for(value)
            is_layer[path] = made_for is not None
            if made_for is not None:
                name, shape = made_for
                found_shape = _shape(members(value).get(name)) or ()
                hints[(*path, name)] = _axes_beside(shape, found_shape)
                if len(found_shape) > len(shape):
                    larger.add((*path, name))
        elif (seen := _shape(value)) is not None:
            shapes[path] = seen
    if not larger:
        return {}, set()
    below: dict[Segments, list[Segments]] = {path: [] for path in is_layer}
    for path in shapes:
        for depth in range(len(path)):
            if path[:depth] in below:
                below[path[:depth]].append(path)
    found = {}
    for path, arrays in below.items():
        axes = [hints[each] for each in arrays if each in hints]
        fitting = {
            axis
            for axis in (set.intersection(*axes) if axes else ())
            if len({_size(shapes[each], axis) for each in arrays}) == 1
        }
        if fitting == {0, -1}:  # vectors alone
            fitting = {0}
        if len(fitting) == 1:
            found[path] = fitting.pop()
    # That each of a stack's own layers is a stack is of use only where it is all that is one, and
    # nobody asks for layers of the whole model if modules in it have some.
    blocks = {path for path in found if path and not is_layer[path]}
    told = {
        path: axis
        for path, axis in found.items()
        if path in blocks
        or (path and not any(path[:depth] in blocks for depth in range(len(path))))
        or not (path or blocks)
    }
    unclear = {
        path
        for path, arrays in below.items()
        if path not in found and larger.issuperset(each for each in arrays if each in hints)
    }
    return told, unclear


def _size(shape: tuple[int, ...], axis: int) -> int | tuple[int, ...]:
    """The size along an axis; of arrays that do not have it, the whole shape, which is no size."""
    return shape[axis] if -len(shape) <= axis < len(shape) else shape


def _axes_beside(made_for: tuple[int, ...], seen: tuple[int, ...]) -> set[int]:
    """Along which axis layers that were made for a shape may be stacked, to have another one."""
    if len(seen) != len(made_for) + 1:
        return set()
    axes = {axis for axis in range(len(seen)) if seen[:axis] + seen[axis + 1 :] == made_for}
    return axes | {-1} if len(made_for) in axes else axes


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of an array, or of the array in a variable; None of all else."""
    if is_variable(value):
        nnx = loaded_nnx()
        leaves = [] if isinstance(value, nnx.RngState) else jax.tree.leaves(value)
        value = leaves[0] if len(leaves) == 1 else None
    shape = getattr(value, "shape", None)
    return shape if isinstance(shape, tuple) and hasattr(value, "dtype") else None


def _made_for(layer: Any) -> tuple[str, tuple[int, ...]] | None:
    """The name of the largest array of a layer, and the shape that the layer made it with."""
    has = vars(layer).get
    if has("kernel_shape") is not None:
        return "kernel", tuple(has("kernel_shape"))
    if has("kernel") is not None and has("out_features") is not None and not has("batch_axis"):
        return "kernel", (*_sizes(has("in_features")), *_sizes(has("out_features")))
    if has("embedding") is not None and has("num_embeddings") is not None:
        return "embedding", (has("num_embeddings"), has("features"))
    if has("scale") is not None and has("num_features") is not None:
        return "scale", (has("num_features"),)
    nn = getattr(loaded_equinox(), "nn", None)
    if nn is None or has("weight") is None:
        return None
    if isinstance(layer, nn.Linear):
        sizes = layer.out_features, layer.in_features
        return "weight", tuple(1 if size == "scalar" else size for size in sizes)
    if isinstance(layer, nn.Embedding):
        return "weight", (layer.num_embeddings, layer.embedding_size)
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return "weight", tuple(layer.shape)
    if isinstance(layer, nn.Conv):
        outputs, inputs = layer.out_channels, layer.in_channels // layer.groups
        return "weight", (outputs, inputs, *layer.kernel_size)
    return None


def _sizes(size: Any) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)
