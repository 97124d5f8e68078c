"""The arguments of a loss function, as arrays and all else."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrmult._errors import FeaturesError, listing
from lrmult._levels import PyTree
from lrmult._libraries import is_nnx_module, is_variable, loaded_equinox, loaded_nnx
from lrmult._paths import ParamTree
from lrmult._scaling import explicit_sharding

Abstract = jax.ShapeDtypeStruct
_ARRAY = "an array"  # in place of one; no leaf of a module is this text


@dataclasses.dataclass(frozen=True)
class Form:
    """What parameters are beside their arrays.

    Attributes:
        treedef: the structure of the tree, or of the state of a module.
        others: the leaves that are no arrays, such as activation functions.
        types: the types of these, since 1, 1.0 and True are equal.
        graphdef: what an NNX module is beside its state.
    """

    treedef: Any
    others: tuple[Any, ...]
    types: tuple[type, ...]
    graphdef: Any

    def tree(self, arrays: Sequence[Any]) -> PyTree:
        """The tree, or the state, with these arrays."""
        left = iter(arrays)
        return self.treedef.unflatten(
            [next(left) if other is _ARRAY else other for other in self.others]
        )

    def params(self, arrays: Sequence[Any]) -> PyTree:
        """The parameters, as a loss function gets them."""
        tree = self.tree(arrays)
        return tree if self.graphdef is None else loaded_nnx().merge(self.graphdef, tree)

    def after(self, params: PyTree) -> list[Any]:
        """The arrays of a module after a call, which may have changed them; of a tree none."""
        if self.graphdef is None:
            return []
        arrays, form = flattened(params)
        if form.treedef != self.treedef:
            raise FeaturesError("loss_fn gives the module other variables than it had")
        return arrays

    def update(self, module: Any, changed: dict[int, Any]) -> None:
        """Give a module other arrays in some places."""
        nnx = loaded_nnx()
        state = nnx.state(module)
        paths = dict(nnx.to_flat_state(self.tree(range(len(self.others)))))
        places = {path: jax.tree.leaves(variable) for path, variable in paths.items()}
        new = [
            (
                path,
                jax.tree.unflatten(
                    jax.tree.structure(variable), [changed[i] for i in places[path]]
                ),
            )
            for path, variable in nnx.to_flat_state(state)
            if places[path] and all(i in changed for i in places[path])
        ]
        nnx.update(module, nnx.from_flat_state(new))


def flattened(params: PyTree) -> tuple[list[Any], Form]:
    """The arrays of parameters, and all else that they are."""
    graphdef = None
    if is_nnx_module(params):
        graphdef, params = loaded_nnx().split(params)
    leaves, treedef = jax.tree.flatten(params)
    if not _holds_equinox(params):  # whose modules hold numbers that are to stay numbers
        leaves = [jnp.asarray(leaf) if isinstance(leaf, NUMBERS) else leaf for leaf in leaves]
    others = tuple([_ARRAY if hasattr(leaf, "dtype") else leaf for leaf in leaves])
    arrays = [leaf for leaf in leaves if hasattr(leaf, "dtype")]
    return arrays, Form(treedef, others, tuple(map(type, others)), graphdef)


NUMBERS = bool | int | float | complex


def _holds_equinox(params: PyTree) -> bool:
    equinox = loaded_equinox()
    if equinox is None:
        return False
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, equinox.Module))
    return any(isinstance(node, equinox.Module) for node in nodes)


def random_states(tree: PyTree) -> list[bool]:
    """Per leaf, whether it is the state of a random number generator of NNX."""
    nnx, found = loaded_nnx(), []
    for node in jax.tree.leaves(tree, is_leaf=is_variable):
        is_state = is_variable(node) and isinstance(node, nnx.RngState)
        found += [is_state] * len(jax.tree.leaves(node))
    return found


def abstract(array: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array or a number, as JAX has it."""
    if isinstance(array, Abstract):
        return array
    if not hasattr(array, "dtype"):
        array = jnp.asarray(array)
    sharding = explicit_sharding(array) if isinstance(array, jax.Array) else None
    dtype = jax.dtypes.canonicalize_dtype(array.dtype, allow_extended_dtype=True)
    weak = getattr(array, "weak_type", False)
    return Abstract(array.shape, dtype, sharding=sharding, weak_type=weak)


def paths_of(tree: PyTree) -> list[str]:
    """The path of each array of a tree; no text for what is no array."""
    found = ParamTree(tree)
    names = {index: found.text(node) for index, node in found.arrays()}
    return [names.get(index, "") for index in range(len(found.places))]


def example_axes(batch: PyTree, told: Any) -> tuple[tuple[int | None, ...], str]:
    """Per array of a batch the axis along which its examples lie, and if that is unknown, why.

    Args:
        batch: the arrays, or their shapes.
        told: an axis for all, or a prefix of the batch with axes, in which None is for what has no
            examples; None to find them out.
    """
    leaves, treedef = jax.tree.flatten(batch)
    shapes = [leaf.shape for leaf in leaves]
    if told is None:
        return _found_axes(shapes, paths_of(batch))
    if isinstance(told, int):
        axes = [told if shape else None for shape in shapes]
    else:
        axes = _broadcast(told, batch, treedef)
    for place, (axis, shape) in enumerate(zip(axes, shapes, strict=True)):
        if axis is not None:
            if not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
                raise FeaturesError(f"batch_axis: {axis!r} is no axis of an array of shape {shape}")
            axes[place] = axis % len(shape)
    sizes = {shape[axis] for shape, axis in zip(shapes, axes, strict=True) if axis is not None}
    if len(sizes) != 1:
        raise FeaturesError(
            f"batch_axis: the arrays of the batch have {sorted(sizes)} examples along these axes"
        )
    return tuple(axes), ""


def _broadcast(told: Any, batch: PyTree, treedef: Any) -> list[Any]:
    try:
        axes: list[Any] = []
        jax.tree.map(
            lambda axis, part: axes.extend([axis] * len(jax.tree.leaves(part))),
            told,
            batch,
            is_leaf=lambda node: node is None,
        )
    except ValueError as error:
        raise FeaturesError(
            f"batch_axis is neither an axis nor a tree of axes like the batch, {treedef}"
        ) from error
    return axes


def _found_axes(
    shapes: list[tuple[int, ...]], paths: list[str]
) -> tuple[tuple[int | None, ...], str]:
    arrays = [shape for shape in shapes if shape]
    common = set.intersection(*[set(shape) for shape in arrays]) if arrays else set()
    if len({shape[0] for shape in arrays}) == 1:
        return tuple([0 if shape else None for shape in shapes]), ""
    if len(common) == 1 and all(shape.count(*common) == 1 for shape in arrays):
        [size] = common
        return tuple([shape.index(size) if shape else None for shape in shapes]), ""
    seen = [f"{path or 'batch'} {shape}" for path, shape in zip(paths, shapes, strict=True)]
    return (None,) * len(shapes), (
        f"it is not clear along which axis of each array of the batch ({listing(seen)}) the "
        "examples lie; pass batch_axis= to precompute: one axis, or a tree of axes like the batch, "
        "with None for what is no example"
    )


def number_of_examples(batch: PyTree, axes: Sequence[int | None]) -> int:
    """How many examples a batch has; 1 if it is not known."""
    pairs = zip(jax.tree.leaves(batch), axes, strict=True)
    return next((int(np.shape(leaf)[axis]) for leaf, axis in pairs if axis is not None), 1)


def with_examples(batch: PyTree, axes: Sequence[int | None], count: int) -> PyTree:
    """A batch like this, as shapes, with so many examples."""
    leaves = jax.tree.leaves(batch)
    for place, (leaf, axis) in enumerate(zip(leaves, axes, strict=True)):
        if axis is not None:
            shape = (*leaf.shape[:axis], count, *leaf.shape[axis + 1 :])
            leaves[place] = Abstract(
                shape, leaf.dtype, sharding=leaf.sharding, weak_type=leaf.weak_type
            )
    return jax.tree.unflatten(jax.tree.structure(batch), leaves)
