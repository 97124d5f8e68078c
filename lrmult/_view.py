"""A parameter tree as an optimizer sees it that is to see only what trains."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lrmult._paths import PyTree
from lrmult._plan import Plan
from lrmult._regions import Mask
from lrmult._scaling import Box, cut, is_opaque, put_back, select

_UNCUT = Box({}, all_trains=False)


class View:
    """What of a parameter tree trains, and the way there and back.

    In place of a frozen array stands an `optax.MaskedNode`. Where an array is frozen in part, the
    frozen elements are zeros; in the compact form only the box of what trains is left.

    Attributes:
        plan: what trains.
        boxes: per leaf, what is left of it.

    Args:
        plan: what trains.
        compact: whether arrays are cut down to boxes.
        packed: the bits of each element mask.
    """

    def __init__(self, plan: Plan, compact: bool, packed: Mapping[Mask, Any]) -> None:
        self.plan = plan
        self.boxes = plan.boxes if compact else (_UNCUT,) * len(plan.trains)
        self._packed = packed

    def narrow(self, tree: PyTree) -> PyTree:
        """What of a tree like the parameters is for what trains."""
        found = self._leaves(tree)
        for i, leaf in enumerate(found):
            if not self.plan.trains[i]:
                found[i] = optax.MaskedNode()
            elif not is_opaque(leaf):
                if not self.boxes[i].all_trains:
                    zeros = jnp.zeros_like(leaf)
                    leaf = select(self.plan.scales[i], self._packed, zeros, leaf)
                found[i] = cut(leaf, self.boxes[i])
        return self.plan.treedef.unflatten(found)

    def put_back(self, narrow: PyTree, tree: PyTree) -> list[Any]:
        """The leaves of a full tree, with those of a narrow one in their places.

        Frozen elements of arrays that train in part are unspecified.
        """
        found = self._leaves(tree)
        inside = iter(self._narrow_treedef.flatten_up_to(narrow))
        for i, trains in enumerate(self.plan.trains):
            if trains:
                leaf = next(inside)
                found[i] = leaf if is_opaque(leaf) else put_back(leaf, self.boxes[i], found[i])
        return found

    def widen(self, narrow: PyTree, tree: PyTree) -> PyTree:
        """A narrow tree, with what is frozen taken from a full one."""
        found = [
            select(scales, self._packed, frozen, trained) if trains else frozen
            for scales, trains, frozen, trained in zip(
                self.plan.scales,
                self.plan.trains,
                self._leaves(tree),
                self.put_back(narrow, tree),
                strict=True,
            )
        ]
        return self.plan.treedef.unflatten(found)

    def is_narrow(self, tree: PyTree) -> bool:
        """Whether a tree is structured like a narrow one."""
        return bool(jax.tree.structure(tree) == self._narrow_treedef)

    def _leaves(self, tree: PyTree) -> list[Any]:
        return list(self.plan.treedef.flatten_up_to(tree))

    @functools.cached_property
    def _narrow_treedef(self) -> Any:
        leaves = [0 if trains else optax.MaskedNode() for trains in self.plan.trains]
        return jax.tree.structure(self.plan.treedef.unflatten(leaves))
