"""A parameter tree as an optimizer sees it that is to see only what trains."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lrmult._errors import RuleError
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
        """What of a tree like the parameters is for what trains.

        Its arrays may have more axes in front, as gradients for each example have.
        """
        found = []
        for i, leaf in enumerate(self._leaves(tree)):
            if self.plan.trains[i]:
                narrow = functools.partial(self._narrow, i)
                for _ in range(np.ndim(leaf) - len(self.plan.shapes[i])):
                    narrow = jax.vmap(narrow)
                found.append(narrow(leaf))
        return self.plan.narrow_treedef.unflatten(found)

    def _narrow(self, i: int, leaf: Any) -> Any:
        if is_opaque(leaf):
            return leaf
        box = self.boxes[i]
        if not box.all_trains:
            zero = np.zeros((), getattr(leaf, "dtype", None))  # Python's numbers have no parts
            leaf = select(self.plan.scales[i], self._packed, zero, leaf)
        return cut(leaf, box)

    def put_back(self, narrow: PyTree, tree: PyTree) -> list[Any]:
        """The leaves of a full tree, with those of a narrow one in their places.

        Frozen elements of arrays that train in part are unspecified.

        Raises:
            RuleError: if the narrow one is structured otherwise.
        """
        found = self._leaves(tree)
        try:
            inside = iter(self.plan.narrow_treedef.flatten_up_to(narrow))
        except (TypeError, ValueError):
            raise RuleError(
                "the updates of the optimizer are not structured like its gradients, as those of "
                "optax.lookahead; put lrmult.wrap inside it"
            ) from None
        for i, trains in enumerate(self.plan.trains):
            for _ in range(np.ndim(found[i]) - len(self.plan.shapes[i])):
                found[i] = found[i][0]
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
        return bool(jax.tree.structure(tree) == self.plan.narrow_treedef)

    def _leaves(self, tree: PyTree) -> list[Any]:
        return list(self.plan.treedef.flatten_up_to(tree))
