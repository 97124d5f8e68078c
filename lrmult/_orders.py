"""What a position counts at a node of a parameter tree, and in which order."""

import itertools
from collections.abc import Collection, Iterable, Mapping

from lrmult._errors import IndexRangeError, PositionError, shorten
from lrmult._paths import ParamTree
from lrmult._positions import Family, base_names, family_of, order_of, stems


class Orders:
    """The orders of the children of nodes, found as they are asked for."""

    def __init__(self, tree: ParamTree) -> None:
        self._tree = tree
        self._orders: dict[int, Family | PositionError] = {}
        self._groups: dict[int, dict[str, list[str]]] = {}
        self._families: dict[tuple[int, str], Family | None] = {}

    def counted(self, node: int, name: str | None) -> tuple[int, Mapping[str, int], Family | None]:
        """What a position counts: the node that it stands below, the children there, their order.

        These are the layers or the children of the node (`name` is None), else those of its child
        of that name if they have an order, else the children called by that name and a number.

        Raises:
            PositionError: if these have no order.
        """
        tree = self._tree
        children = tree.children[node]
        child = node if name is None else children.get(name)
        no_order = None
        if child is not None and (child not in tree.holes or child in tree.order):
            try:
                return child, tree.layers.get(child, tree.children[child]), self._order(child)
            except PositionError as error:
                no_order = error
        family = None
        if name is not None:
            family = self._family(node, name)
        if no_order and family is None:
            raise no_order
        return node, children, family

    def countable(self, node: int) -> Iterable[str]:
        """The names below a node that a position may follow: of children, and of families."""
        bases = itertools.chain.from_iterable(map(base_names, self._stems(node)))
        return dict.fromkeys([*self._names(node), *filter(None, bases)])

    def _names(self, node: int) -> Collection[str]:
        """The names of the children of a node, layers without parameters among them."""
        given = self._tree.order.get(node, ())
        return (
            dict.fromkeys([*self._tree.children[node], *given])
            if given
            else self._tree.children[node]
        )

    def _order(self, node: int) -> Family:
        if node not in self._orders:
            try:
                self._orders[node] = self._find_order(node)
            except PositionError as error:
                self._orders[node] = error
        order = self._orders[node]
        if isinstance(order, PositionError):
            raise order
        return order

    def _family(self, node: int, name: str) -> Family | None:
        key = node, name
        if key not in self._families:
            self._families[key] = family_of(
                self._names(node), name, self._stems(node), self._tree.text(node)
            )
        return self._families[key]

    def _find_order(self, node: int) -> Family:
        children = self._tree.children[node]
        if self._tree.layers.get(node) == {}:
            raise IndexRangeError(f"{shorten(self._tree.text(node))!r} is a stack of no layers")
        if node in self._tree.layers:
            return Family({int(number): number for number in self._tree.layers[node]})
        given = self._tree.order.get(node)
        if not children and not given:
            raise PositionError(self._childless(node))
        try:
            return order_of(children, given, self._tree.text(node), self._remedy(node))
        except PositionError as error:
            error.node = node
            raise

    def _remedy(self, node: int) -> str | None:
        """What to do where the children of a node have no order, other than to name them."""
        children = self._tree.children
        if node and not any(children[child] for child in children[node].values()):
            return None  # of the arrays of one layer, no model tells an order
        if not self._tree.is_read:
            return "pass structure=lrmult.structure_of(model), which knows it"
        path = shorten(self._tree.text(node))
        return (
            "keep them in a list, or say their order: structure | lrmult.Structure(order="
            f"{{{path!r}: [...]}}) (structure_of tells none where the attributes of an NNX module "
            "stand sorted, as nnx.jit leaves them)"
        )

    def _childless(self, node: int) -> str:
        if not node:
            return "the tree is empty or a bare array, and has no children for a position to count"
        leaves = [leaf for leaf, place in self._tree.arrays() if place == node]
        for known in (self._tree.aliases, self._tree.slices):
            leaves += [leaf for leaf, others in known.items() if node in others]
        if not leaves:
            seen = f"{shorten(self._tree.text(node))!r} holds no array, and"
            return f"{seen} has no children for a position to count"
        if leaves[0] in self._tree.slices:
            layer = self._tree.text(next(iter(self._tree.slices[leaves[0]])))
            return (
                f"{self._tree.show(leaves[0])} is an array in a stack of layers; its layers are "
                f"counted at the node that is stacked, as in {layer!r}"
            )
        return (
            f"{self._tree.show(leaves[0])} is an array, and has no children for a position to "
            "count; leave the position out for the whole array, or write lrmult.rows(target, "
            "index) or lrmult.along(target, axis, index) for part of it"
        )

    def _stems(self, node: int) -> dict[str, list[str]]:
        if node not in self._groups:
            self._groups[node] = stems(self._names(node))
        return self._groups[node]
