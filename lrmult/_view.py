"""A parameter tree as an optimizer sees it that is to see only what trains."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from optax import MaskedNode

from lrmult._errors import RuleError
from lrmult._levels import PyTree
from lrmult._libraries import box_types, loaded_nnx
from lrmult._plan import Plan
from lrmult._regions import Mask
from lrmult._scaling import Box, box_of, cut, is_opaque, put_back, select

_UNCUT = Box({}, all_trains=False)


class View:
    """What of a parameter tree trains, and the way there and back.

    In place of a frozen array stands an `optax.MaskedNode`. Where an array is frozen in part, the
    frozen elements are zeros; in the compact form only the box of what trains is left.

    Attributes:
        plan: what trains.
        boxes: per leaf, what is left of it.
        treedef: the structure of what is left.

    Args:
        plan: what trains.
        compact: whether arrays are cut down to boxes.
        packed: the bits of each element mask.
    """

    def __init__(self, plan: Plan, compact: bool, packed: Mapping[Mask, Any]) -> None:
        self.plan = plan
        self.boxes = _boxes(plan) if compact else (_UNCUT,) * len(plan.trains)
        self.treedef: Any = _narrow_treedef(plan)
        self._packed = packed

    def narrow(self, tree: PyTree) -> PyTree:
        """What of a tree like the parameters is for what trains.

        Its arrays may have more axes in front, as gradients for each example have. Those that are
        not like the parameter are left as they are.
        """
        found = []
        for i, leaf in enumerate(self._leaves(tree)):
            if not self.plan.trains[i]:
                continue
            shape, lead = self.plan.shapes[i], self._lead(i, leaf)
            if lead >= 0 and np.shape(leaf)[lead:] == shape:
                leaf = over(lead, functools.partial(self._narrow, i))(leaf)
            found.append(leaf)
        return self.treedef.unflatten(found)

    def _narrow(self, i: int, leaf: Any) -> Any:
        if is_opaque(leaf):
            return leaf
        box = self.boxes[i]
        if not box.all_trains:
            zero = np.zeros((), getattr(leaf, "dtype", None))  # Python's numbers have no parts
            leaf = self.select(i, zero, leaf)
        return cut(leaf, box)

    def put_back(self, narrow: PyTree, tree: PyTree) -> list[Any]:
        """The leaves of a full tree, with those of a narrow one in their places.

        Frozen elements of arrays that train in part are unspecified.

        Raises:
            RuleError: if the narrow one is structured otherwise, or an array that trains in part is
                of another shape.
        """
        found = self._leaves(tree)
        try:
            inside = iter(self.treedef.flatten_up_to(narrow))
        except (TypeError, ValueError):
            raise RuleError(
                "the updates of the optimizer are not structured like its gradients, as those of "
                "optax.lookahead; put lrmult.wrap inside it"
            ) from None
        for i, trains in enumerate(self.plan.trains):
            for _ in range(self._lead(i, found[i])):
                found[i] = found[i][0]
            if trains:
                leaf = next(inside)
                if not is_opaque(leaf):
                    self._check_shape(i, leaf)
                    leaf = put_back(leaf, self.boxes[i], found[i])
                found[i] = leaf
        return found

    def _check_shape(self, i: int, leaf: Any) -> None:
        wanted = self.boxes[i].size(self.plan.shapes[i])
        if len(self.plan.scales[i]) > 1 and np.shape(leaf) != wanted:
            raise RuleError(
                f"the optimizer has an update of shape {np.shape(leaf)} for what trains of "
                f"{self.plan.tree.show(i)}, where {wanted} was expected; pass the gradients with "
                "respect to these parameters"
            )

    def widen(self, narrow: PyTree, tree: PyTree) -> PyTree:
        """A narrow tree, with what is frozen taken from a full one."""
        leaves, inside = self._leaves(tree), self.put_back(narrow, tree)
        for i, trains in enumerate(self.plan.trains):
            if trains:
                leaves[i] = self.select(i, leaves[i], inside[i])
        return self.plan.treedef.unflatten(leaves)

    def select(self, i: int, if_frozen: Any, if_trained: Any) -> Any:
        """The array of a leaf that is one where it is frozen, and another where it trains."""
        return select(self.plan.scales[i], self._packed, if_frozen, if_trained)

    def is_full(self, tree: PyTree) -> bool:
        """Whether a tree is structured like the parameters; one array alone must have its shape."""
        if bool(self.plan.treedef != jax.tree.structure(tree)):
            return False
        is_leaf = jax.tree_util.treedef_is_leaf(self.plan.treedef)
        return not is_leaf or np.shape(tree) == self.plan.shapes[0] != ()

    def is_narrow(self, tree: PyTree) -> bool:
        """Whether a tree is structured like a narrow one."""
        return bool(jax.tree.structure(tree) == self.treedef)

    def _leaves(self, tree: PyTree) -> list[Any]:
        return list(self.plan.treedef.flatten_up_to(tree))

    def _lead(self, i: int, leaf: Any) -> int:
        """How many axes it has in front of those of the parameter."""
        return np.ndim(leaf) - len(self.plan.shapes[i])


def over(axes: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays that have so many more axes in front."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


@functools.lru_cache(maxsize=128)
def _boxes(plan: Plan) -> tuple[Box, ...]:
    """The box of what trains of each leaf."""
    known: dict[Any, Box] = {}  # many leaves share their scales
    found = []
    for shape, scales in zip(plan.shapes, plan.scales, strict=True):
        key = id(scales), shape
        if key not in known:
            known[key] = box_of(shape, scales)
        found.append(known[key])
    return tuple(found)


@functools.lru_cache(maxsize=128)
def _narrow_treedef(plan: Plan) -> Any:
    """The structure of what trains: `optax.MaskedNode` in place of all else, and of its box."""
    tree = plan.treedef.unflatten([0 if trains else MaskedNode() for trains in plan.trains])
    kinds, nnx = box_types(), loaded_nnx()
    # NNX walks all nodes of an optimizer's state in Python, at every call of what it has compiled;
    # so of one of its states what is frozen is cut out in pieces as large as can be.
    whole = nnx is not None and isinstance(tree, nnx.State)

    def is_piece(node: Any) -> bool:
        return isinstance(node, kinds) or (whole and not jax.tree.leaves(node))

    pieces, treedef = jax.tree.flatten(tree, is_leaf=is_piece)
    kept = [piece if jax.tree.leaves(piece) else MaskedNode() for piece in pieces]
    return jax.tree.structure(jax.tree.unflatten(treedef, kept))
