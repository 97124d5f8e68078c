"""Rules compiled against a parameter tree."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from lrmult._checks import check
from lrmult._matching import match
from lrmult._paths import ParamTree, PyTree, shape_and_dtype
from lrmult._rules import Rules, RulesLike, show_rule


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
        shape: its shape.
        dtype: its dtype.
        rules: the rules that claimed it; none if it has the multiplier 1 by default.
        multiplier: the multiplier of its learning rate; 0.0 if it is frozen.
        trained: how many of its elements train.
        frozen: how many of its elements are frozen.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    rules: tuple[Claim, ...]
    multiplier: float
    trained: int
    frozen: int


class Plan:
    """What every array of a parameter tree gets. Made by `compile_rules`.

    ``print(plan)`` shows a table in which subtrees that share one answer are folded.

    Attributes:
        rules: the rules that it was compiled from.
        treedef: the structure of the parameter tree.
        claims: per leaf, in the order of `jax.tree.leaves`, the index of the rule that has it.
        warnings: what `strict=False` let pass.
    """

    rules: Rules
    treedef: Any
    claims: tuple[int | None, ...]
    warnings: tuple[str, ...]

    def __init__(
        self, rules: Rules, tree: ParamTree, claims: Iterable[int | None], warnings: Iterable[str]
    ) -> None:
        self.rules = rules
        self.treedef = tree.treedef
        self._tree = tree
        self.claims = tuple(claims)
        self.warnings = tuple(warnings)

    @functools.cached_property
    def flat_multipliers(self) -> tuple[float, ...]:
        """The multipliers in the order of `jax.tree.leaves`; 1.0 where a leaf is no array."""
        values = [rule.multiplier or 0.0 for rule in self.rules]
        return tuple([1.0 if claim is None else values[claim] for claim in self.claims])

    @property
    def multipliers(self) -> PyTree:
        """A tree like the parameters, of Python floats; 0.0 where frozen."""
        return self.treedef.unflatten(self.flat_multipliers)

    @property
    def frozen(self) -> PyTree:
        """A tree like the parameters, of Python bools: true where the multiplier is zero."""
        return self.treedef.unflatten([value == 0 for value in self.flat_multipliers])

    @property
    def trainable(self) -> PyTree:
        """A tree like the parameters, of Python bools: true where anything trains.

        This is what `optax.masked`, ``optax.adamw(mask=...)`` and `equinox.partition` take. It is
        false where a leaf is no array at all, such as an activation function.
        """
        return self.treedef.unflatten(
            [
                node is not None and value != 0
                for node, value in zip(self._tree.places, self.flat_multipliers, strict=True)
            ]
        )

    @functools.cached_property
    def leaves(self) -> tuple[LeafPlan, ...]:
        """One record per array, in the order of `jax.tree.leaves`."""
        claims = [Claim(i, show_rule(*rule)) for i, rule in enumerate(self.rules)]
        return tuple([self._leaf(index, node, claims) for index, node in self._tree.arrays()])

    def _leaf(self, index: int, node: int, claims: list[Claim]) -> LeafPlan:
        tree, claim, multiplier = self._tree, self.claims[index], self.flat_multipliers[index]
        size = math.prod(tree.shapes[index])
        return LeafPlan(
            path=tree.text(node),
            shape=tree.shapes[index],
            dtype=tree.dtypes[index],
            rules=() if claim is None else (claims[claim],),
            multiplier=multiplier,
            trained=size if multiplier else 0,
            frozen=0 if multiplier else size,
        )

    def __rich__(self) -> Any:
        from lrmult._report import table

        return table(self, self._tree)

    def __str__(self) -> str:
        from lrmult._report import render

        return render(self)

    def __repr__(self) -> str:
        arrays = len(self.leaves)
        return f"<lrmult.Plan of {len(self.rules)} rules for {arrays} arrays; print it for a table>"


def compile_rules(rules: RulesLike, params: PyTree, *, strict: bool = True) -> Plan:
    """Work out what every array of a parameter tree gets.

    For each array the first rule that matches gives the multiplier of its learning rate; it is 1 if
    none does. Only the paths, shapes and dtypes of the arrays are looked at, so shapes are enough
    (`jax.eval_shape`) and no device does any work. The time is linear in the number of arrays,
    whatever the number of rules, but for regular expressions and predicates: each of those is asked
    about every array.

    A rule that does nothing is a mistake, and an error: one that matches nothing, and one all of
    whose matches earlier rules have claimed. Passed over without an error are a closing ``...`` or
    ``"**"``, rules marked with `optional`, and rules that could match inside a hole of the tree
    (`optax.MaskedNode`, ``None``). A ``None`` in the field of a module is a hole of one array.

    Args:
        rules: see `Rules`.
        params: a pytree of arrays or of `jax.ShapeDtypeStruct`.
        strict: if false, rules that match nothing or can never apply are warnings.

    Returns:
        The plan: `Plan.multipliers`, `Plan.frozen`, `Plan.trainable`, `Plan.leaves`, and a table
        when it is printed.

    Raises:
        PatternError: if a target cannot be read.
        MultiplierError: if a multiplier is neither a finite number nor None.
        UnmatchedRuleError: if a rule matches nothing; the message names near misses.
        ShadowedRuleError: if earlier rules claim all that a rule matches.
        PositionError: if a position is asked of children that have no order.
        IndexRangeError: if nothing stands at a position, or a slice selects nothing.
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
    return warned(_compile(Rules(rules), params, strict))


def warned(plan: Plan) -> Plan:
    """The plan, after a warning of each of its mistakes to the caller's caller."""
    for message in plan.warnings:
        warnings.warn(message, stacklevel=3)
    return plan


def trainable_mask(rules: RulesLike, *, strict: bool = True) -> Callable[[PyTree], PyTree]:
    """Make a function from parameters to `Plan.trainable`.

    For arguments that take a mask or a function that makes one, such as those of `optax.masked` and
    ``optax.adamw(mask=...)``. (`optax.inject_hyperparams` takes every function for a schedule; name
    the argument in its ``static_args``.)

    Args:
        rules: see `Rules`.
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
    read = Rules(rules)

    def mask(params: PyTree) -> PyTree:
        return warned(cached_plan(read, params, strict)).trainable

    return mask


def cached_plan(rules: Rules, params: PyTree, strict: bool) -> Plan:
    """The plan for a tree, from a cache that all callers share.

    A plan depends on nothing but the arguments of `_plan_of`, and holds no array of the tree.
    """
    leaves, treedef = jax.tree.flatten(params)
    specs = tuple([shape_and_dtype(leaf) for leaf in leaves])
    try:
        hash((rules, treedef))
    except TypeError:  # a predicate or a static field of a module that cannot be hashed
        return _plan_of.__wrapped__(rules, treedef, specs, strict)
    return _plan_of(rules, treedef, specs, strict)


@functools.lru_cache(maxsize=128)
def _plan_of(rules: Rules, treedef: Any, specs: tuple[Any, ...], strict: bool) -> Plan:
    leaves = [_NO_ARRAY if spec[1] is None else jax.ShapeDtypeStruct(*spec) for spec in specs]
    return _compile(rules, treedef.unflatten(leaves), strict)


_NO_ARRAY = object()  # stands for leaves such as functions


def _compile(rules: Rules, params: PyTree, strict: bool) -> Plan:
    tree = ParamTree(params)
    matches = match([rule.selector for rule in rules], tree)
    passed = check(rules, tree, matches, strict=strict)
    return Plan(rules, tree, [row[0] if row else None for row in matches.rows], passed)
