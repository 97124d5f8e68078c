"""Rules compiled against a parameter tree."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import optax

from lrmult._checks import check
from lrmult._claims import Matched, Pieces
from lrmult._levels import PyTree
from lrmult._libraries import is_nnx_module
from lrmult._matching import match
from lrmult._multipliers import Multiplier
from lrmult._parts import Values, frozen_of, values_of
from lrmult._paths import Flat, ParamTree, shapes_and_dtypes
from lrmult._rules import Rules, RulesLike, show_rule
from lrmult._scaling import Scales, is_frozen, scales_of
from lrmult._structure import Structure, read_structure
from lrmult._structured import add_structure, tied_by_accident


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """A rule that claimed a parameter: its place in the list, and its text. Unpacks as a pair."""

    index: int
    text: str

    def __iter__(self) -> Iterator[Any]:
        yield self.index
        yield self.text


@dataclasses.dataclass(frozen=True, slots=True)
class LeafPlan:
    """What a plan says about one array.

    Attributes:
        path: the array's path, as `paths` lists it.
        aliases: its other paths, if it is shared.
        shape: its shape.
        dtype: its dtype.
        rules: the rules that claimed elements of it, in order; where none did, the multiplier is 1.
        multiplier: the multiplier of its learning rate, as in `Plan.multipliers`.
        trained: how many of its elements train.
        frozen: how many of its elements are frozen.
    """

    path: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    rules: tuple[Claim, ...]
    multiplier: Values = dataclasses.field(compare=False)  # the rules tell it
    trained: int
    frozen: int


class Plan:
    """What every array of a parameter tree gets. Made by `compile_rules`.

    ``print(plan)`` shows a table in which subtrees and siblings that share one answer are folded.

    Attributes:
        rules: the rules that it was compiled from.
        treedef: the structure of the parameter tree.
        structure: the facts about the model that it was compiled with.
        shapes: per leaf, in the order of `jax.tree.leaves`, its shape.
        claims: per leaf which rule has which elements.
        overruled: per leaf that is shared, the rules that lost it to rules on others of its paths.
        warnings: what `strict=False` let pass.
    """

    def __init__(
        self,
        rules: Rules,
        structure: Structure,
        tree: ParamTree,
        claims: Iterable[Pieces],
        overruled: dict[int, list[int]],
        warnings: Iterable[str],
    ) -> None:
        self.rules = rules
        self.structure = structure
        self.treedef: Any = tree.treedef
        self.claims: tuple[Pieces, ...] = tuple(claims)
        self.overruled = overruled
        self.warnings: tuple[str, ...] = tuple(warnings)
        self.shapes: tuple[tuple[int, ...], ...] = tuple(tree.shapes)
        self.tree = tree

    def _per_leaf(
        self, make: Callable[[tuple[int, ...], Pieces, list[Multiplier]], Any]
    ) -> list[Any]:
        """What to make of each leaf's shape, pieces, and what these get."""
        given = [rule.multiplier for rule in self.rules]
        known: dict[Any, Any] = {}  # arrays that one rule has as a whole share their pieces
        found = []
        for shape, pieces in zip(self.shapes, self.claims, strict=True):
            key = id(pieces), shape
            if key not in known:
                got = [1.0 if piece.rule is None else given[piece.rule] for piece in pieces]
                known[key] = make(shape, pieces, got)
            found.append(known[key])
        return found

    @functools.cached_property
    def scales(self) -> tuple[Scales, ...]:
        """How each leaf is scaled, in the order of `jax.tree.leaves`."""
        return tuple(self._per_leaf(scales_of))

    @functools.cached_property
    def _values(self) -> list[Values]:
        return self._per_leaf(values_of)

    @property
    def multipliers(self) -> PyTree:
        """A tree like the parameters: what multiplies the learning rate of each array.

        A Python float; where an array is ruled along one axis, a NumPy array that broadcasts
        against it, such as ``(1, 512)``; where several axes, masks, schedules or run-time values
        mix, a `Parts`. It is 0.0 where frozen.
        """
        return self.treedef.unflatten(self._values)

    @property
    def frozen(self) -> PyTree:
        """A tree like the parameters: what is frozen, that is, has a static multiplier of zero.

        A Python bool; where only part of an array is frozen, a NumPy array of bools that broadcasts
        against it, or a `Parts`.
        """
        return self.treedef.unflatten(
            self._per_leaf(
                lambda shape, pieces, got: frozen_of(
                    shape, pieces, [value is None for value in got]
                )
            )
        )

    @property
    def trainable(self) -> PyTree:
        """A tree like the parameters, of Python bools: true where anything trains.

        This is what `optax.masked`, ``optax.adamw(mask=...)`` and `equinox.partition` take. It is
        false where a leaf is no array at all, such as an activation function.
        """
        return self.treedef.unflatten(self.trains)

    @functools.cached_property
    def trains(self) -> tuple[bool, ...]:
        """The leaves of `trainable`."""
        return tuple(
            [
                node is not None and not is_frozen(scales)
                for node, scales in zip(self.tree.places, self.scales, strict=True)
            ]
        )

    @functools.cached_property
    def leaves(self) -> tuple[LeafPlan, ...]:
        """One record per array, in the order of `jax.tree.leaves`."""
        claims = [Claim(i, show_rule(*rule)) for i, rule in enumerate(self.rules)]
        return tuple([self._leaf(index, node, claims) for index, node in self.tree.arrays()])

    def _leaf(self, index: int, node: int, claims: list[Claim]) -> LeafPlan:
        tree, pieces = self.tree, self.claims[index]
        size = math.prod(tree.shapes[index])
        frozen = sum(
            size if piece.count is None else piece.count
            for piece in pieces
            if piece.rule is not None and self.rules[piece.rule].multiplier is None
        )
        claiming = dict.fromkeys(piece.rule for piece in pieces if piece.rule is not None)
        return LeafPlan(
            path=tree.text(node),
            aliases=tuple(tree.text(alias) for alias in tree.aliases.get(index, ())),
            shape=tree.shapes[index],
            dtype=tree.dtypes[index],
            rules=tuple(claims[rule] for rule in claiming),
            multiplier=self._values[index],
            trained=size - frozen,
            frozen=frozen,
        )

    def plot(self, *, steps: int | Sequence[int] | None = None, ax: Any = None) -> Any:
        """Draw the multipliers along the depth of the model, or over the steps of training.

        Without `steps`, each layer has a dot for each of its multipliers, whose area is the share
        of the layer's parameters that have it; a band below shows how much of the layer is frozen.
        With `steps`, rows are layers, columns steps and colours multipliers, and grey is frozen; a
        layer with several multipliers is split.

        Layers are nodes of the tree, as far up as there are more than a few, in the order of their
        numbers or that of `structure`. It takes matplotlib (``pip install matplotlib``).

        Args:
            steps: a number of steps, or a sequence of them. Needed where there are schedules.
            ax: the axes to draw on; by default those of a new figure, which pyplot does not keep.

        Returns:
            The axes. Their ``figure`` is what a notebook shows, and has ``savefig``.

        Raises:
            RuleError: if a multiplier depends on the step and `steps` is not given, or is a value
                that is known at run time only.
            LrmultError: if `steps` are no steps.

        Example:
            >>> import jax.numpy as jnp
            >>> import lrmult as lm
            >>> layers = [jnp.ones((4, 4)) for _ in range(3)]
            >>> params = {"layers": layers, "head": jnp.ones((4, 2))}
            >>> rules = [("head", 10), ("layers[0]", None), ("layers", 0.1)]
            >>> ax = lm.compile_rules(rules, params).plot()
            >>> [label.get_text() for label in ax.get_xticklabels()]
            ['head', 'layers/0', '1', '2']
            >>> [label.get_text() for label in ax.get_yticklabels()]
            ['frozen', '0.1', '10']
        """
        from lrmult._plots import plot

        return plot(self, steps, ax)

    def _repr_html_(self) -> str:
        from lrmult._report import html_table

        return html_table(self)

    def __rich__(self) -> Any:
        from lrmult._report import table

        return table(self)

    def __str__(self) -> str:
        from lrmult._report import render

        return render(self)

    def __repr__(self) -> str:
        arrays = len(self.leaves)
        return f"<lrmult.Plan of {len(self.rules)} rules for {arrays} arrays; print it for a table>"


def compile_rules(
    rules: RulesLike,
    params: PyTree,
    *,
    structure: Structure | None = None,
    strict: bool = True,
) -> Plan:
    """Work out what every array of a parameter tree gets.

    For each array, element by element, the first rule that matches gives the multiplier of the
    learning rate; it is 1 if none does. Only the paths, shapes and dtypes of the arrays are looked
    at, so shapes are enough (`jax.eval_shape`) and no device does any work. The time is linear in
    the number of arrays, whatever the number of rules, but for regular expressions and predicates:
    each of those is asked about every array.

    A rule that does nothing is a mistake, and an error: one that matches nothing, and one all of
    whose matches earlier rules have claimed. Passed over without an error are a closing ``...`` or
    ``"**"``, rules marked with `optional`, rules that lost a shared array to one on another of its
    paths, and rules that could match inside a hole of the tree (`optax.MaskedNode`, ``None``). A
    ``None`` in the field of a module is a hole of one array. If one array stands at two leaves,
    which come apart at the first step, there is a warning.

    Args:
        rules: see `Rules`.
        params: a pytree of arrays or of `jax.ShapeDtypeStruct`.
        structure: what the tree does not tell; see `structure_of` and `Structure`.
        strict: if false, rules that match nothing or can never apply are warnings.

    Returns:
        The plan: `Plan.multipliers`, `Plan.frozen`, `Plan.trainable`, `Plan.leaves`, and a table
        when it is printed.

    Raises:
        PatternError: if a target cannot be read.
        MultiplierError: if a multiplier cannot be read.
        UnmatchedRuleError: if a rule matches nothing; the message names near misses.
        ShadowedRuleError: if earlier rules claim all that a rule matches.
        PositionError: if a position is asked of children that have no order.
        IndexRangeError: if nothing stands at a position or an index, or a slice selects nothing.
        AxisError: if an array has no such axis, or its output axis is not known.
        MaskError: if a mask has not the shape of an array that it is for.
        RuleError: for all else that is wrong with a rule, the list, or the tree.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {
        ...     "encoder": [{"w": jnp.ones((8, 8)), "b": jnp.ones(8)} for _ in range(4)],
        ...     "head": {"w": jnp.ones((8, 2)), "b": jnp.ones(2)},
        ... }
        >>> rules = [("encoder[:3]", None), ("**/b", 2), ("head", 10)]
        >>> plan = lm.compile_rules(rules, params)
        >>> print(plan)
        parameters     arrays                      size   multiplier   rule
        -------------------------------------------------------------------------------
        encoder[0:3]   3 x f32[8] + 3 x f32[8,8]    216       frozen   0: 'encoder[:3]'
        encoder/3/b    f32[8]                         8            2   1: '**/b'
        encoder/3/w    f32[8,8]                      64            1   none
        head/b         f32[2]                         2            2   1: '**/b'
        head/w         f32[8,2]                      16           10   2: 'head'
        <BLANKLINE>
        10 arrays, 306 parameters: 90 train, 216 frozen
        >>> plan.multipliers["head"]
        {'b': 2.0, 'w': 10.0}
    """
    read, facts = Rules(rules), read_structure(structure)
    flat = jax.tree.flatten(params)
    return warned(_compile(read, params, flat, facts, strict), params, flat[0])


def warned(plan: Plan, params: PyTree = None, leaves: Sequence[Any] | None = None) -> Plan:
    """The plan, after a warning of each mistake in it, or in the tree, to the caller's caller."""
    tied = None
    # A module of NNX shares arrays on purpose, and lookahead's parameters are to come apart.
    if not (is_nnx_module(params) or isinstance(params, optax.LookaheadParams)):
        leaves = jax.tree.leaves(params) if leaves is None else leaves
        tied = tied_by_accident(plan.tree, leaves, lambda leaf: plan.trains[leaf])
    for message in (*plan.warnings, *filter(None, [tied])):
        warnings.warn(message, stacklevel=3)
    return plan


def trainable_mask(
    rules: RulesLike, *, structure: Structure | None = None, strict: bool = True
) -> Callable[[PyTree], PyTree]:
    """Make a function from parameters to `Plan.trainable`.

    For arguments that take a mask or a function that makes one, such as those of `optax.masked` and
    ``optax.adamw(mask=...)``. (`optax.inject_hyperparams` takes every function for a schedule; name
    the argument in its ``static_args``.)

    Args:
        rules: see `Rules`.
        structure: as for `compile_rules`.
        strict: as for `compile_rules`.

    Returns:
        A function of a parameter tree that returns a tree of Python bools.

    Raises:
        LrmultError: at once if a rule cannot be read; from the function what `compile_rules`
            raises.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> lm.trainable_mask([("trunk", None)])({"head": jnp.ones(2), "trunk": jnp.ones(3)})
        {'head': True, 'trunk': False}
    """
    read, structure = Rules(rules), read_structure(structure)

    def mask(params: PyTree) -> PyTree:
        return warned(cached_plan(read, params, structure, strict)).trainable

    return mask


def cached_plan(rules: Rules, params: PyTree, structure: Structure | None, strict: bool) -> Plan:
    """The plan for a tree, from a cache that all callers share.

    A plan depends on nothing but the arguments of `_plan_of`, and holds no array of the tree. The
    schedules and arrays among the multipliers are stood in for by a `Dynamic` each.
    """
    leaves, treedef = jax.tree.flatten(params)
    specs = tuple(shapes_and_dtypes(leaves))
    facts = read_structure(structure)
    # Equal facts by hand are checked against the tree, while those that were read are not.
    arguments = rules.abstract, treedef, specs, facts, facts._read, strict
    try:
        hash(arguments[:2])
    except TypeError:  # a predicate or a static field of a module that cannot be hashed
        return _plan_of.__wrapped__(*arguments)
    return _plan_of(*arguments)


@functools.lru_cache(maxsize=128)
def _plan_of(
    rules: Rules,
    treedef: Any,
    specs: tuple[Any, ...],
    structure: Structure,
    read: frozenset[str] | None,
    strict: bool,
) -> Plan:
    del read  # a part of the structure that its equality leaves out
    leaves = [_NO_ARRAY if spec[1] is None else jax.ShapeDtypeStruct(*spec) for spec in specs]
    return _compile(rules, treedef.unflatten(leaves), (leaves, treedef), structure, strict)


_NO_ARRAY = object()  # stands for leaves such as functions


def _compile(rules: Rules, params: PyTree, flat: Flat, structure: Structure, strict: bool) -> Plan:
    tree = ParamTree(params, flat)
    add_structure(tree, structure)
    matches = match([rule.selector for rule in rules], tree)
    matched = Matched(rules, tree, matches)
    passed = check(rules, tree, matches, matched, strict=strict)
    return Plan(rules, structure, tree, matched.claims, matched.overruled, passed)
