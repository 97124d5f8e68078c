"""Which optimizer of optax does what under rules: the rows of docs/optimizers.md, by running them.

``python tests/conformance.py`` writes the table anew; ``tests/test_optimizers.py`` holds every row
against a fresh run.
"""

import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import lrmult as lm

STEPS = 6
RATIO = 0.3
PATH_TOLERANCE = 2e-5
REST_TOLERANCE = 2e-5

SHAPE = (4, 3)
FROZEN_ROWS = np.array([True, True, False, False])[:, None]
RULES = [
    ("**/frozen", None),
    (lm.rows("**/part", [0, 1]), None),
    ("**/slow", RATIO),
]
TRAINED = ("bias", "free", "slow")


def _leaf(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return values + np.sign(values) * np.float32(0.3)


def _params() -> dict[str, np.ndarray]:
    params = {name: _leaf(i) for i, name in enumerate(("free", "frozen", "part", "slow"))}
    params["frozen"][1, 1] = params["part"][0, 2] = -0.0
    return {"bias": _leaf(9, (3,)), **params}


PARAMS = _params()
GRADS = [
    {
        name: np.cos(2.3 * step + 1.7 * np.arange(p.size) + 0.6 * i, dtype=np.float32).reshape(
            p.shape
        )
        for i, (name, p) in enumerate(PARAMS.items())
    }
    for step in range(STEPS)
]
VALUES = np.float32([3.0, 2.0, 2.5, 2.4, 2.6, 1.0])
NOTHING_FROZEN = {name: np.zeros((1,) * p.ndim, bool) for name, p in PARAMS.items()}
WHOLE_FROZEN = {**NOTHING_FROZEN, "frozen": np.ones((1, 1), bool)}
ALL_FROZEN = {**WHOLE_FROZEN, "part": FROZEN_ROWS}
Spoil = tuple[dict[str, np.ndarray], float]
CLEAN: Spoil = (NOTHING_FROZEN, 1.0)


# What an optimizer is given ------------------------------------------------------------------


@jax.custom_jvp
def _spoiled(x: Any, factor: Any) -> Any:
    """The value as it is, with its derivative multiplied."""
    del factor
    return x


_spoiled.defjvp(lambda primals, tangents: (primals[0], tangents[0] * primals[1]))


def _loss(params: Any, factors: Any, step: Any) -> Any:
    """A sum of squares to whose minimum each element goes on its own."""
    total = 0.0
    for i, name in enumerate(sorted(params)):
        x = _spoiled(params[name], factors[name])
        steep = 1.0 + 0.5 * jnp.cos(jnp.arange(x.size) + i).reshape(x.shape)
        goal = 0.5 * jnp.sin(jnp.arange(x.size) * 2.0 + i).reshape(x.shape)
        total += jnp.sum(0.5 * steep * (x - goal - 0.02 * step) ** 2)
    return total


Given = Literal["grads", "value", "value_fn", "obj_fn", "grad_fn", "per_example"]


def _inputs(given: Given, params: Any, batch: Any, widen: Callable[[Any], Any]) -> Any:
    """The gradients, and the extra arguments of `update`."""
    step, grads, value, factors = batch
    if given == "per_example":
        return {n: jnp.stack([g, -0.5 * g, g * g, 0.3 * g]) for n, g in grads.items()}, {}
    if given == "grads":
        return grads, {}
    if given == "value":
        return grads, {"value": value}
    if given == "grad_fn":

        def grad_fn(at: Any, i: Any) -> Any:
            del i
            return {n: g + 0.5 * at[n] * factors[n] for n, g in grads.items()}

        return grads, {"grad_fn": grad_fn}

    def value_fn(at: Any) -> Any:
        return _loss(widen(at), factors, step)

    if given == "obj_fn":
        return grads, {"obj_fn": value_fn}
    found, grads = jax.value_and_grad(value_fn)(params)
    return grads, {"value": found, "grad": grads, "value_fn": value_fn}


# Rows ----------------------------------------------------------------------------------------

Around = Callable[[Any], Any]


@dataclass(frozen=True)
class Row:
    """An optimizer, or a way to use it.

    Attributes:
        name: as shown.
        names: the exports of optax that it speaks for.
        place: makes it for a learning rate, with the rules around what they belong around.
        given: what `update` is given.
        rate: the learning rate.
        jit: whether all steps are jitted; otherwise those of `wrap` alone.
        notes: which remarks apply.
        look: the parameters are `optax.LookaheadParams`.
    """

    name: str
    names: tuple[str, ...]
    place: Callable[[Any, Around], Any]
    given: Given = "grads"
    rate: float = 0.05
    jit: bool = False
    notes: tuple[str, ...] = ()
    look: bool = False


ROWS: dict[str, Row] = {}


def _add(name: str, make: Callable[[Any], Any], **options: Any) -> None:
    """A row for an optimizer with the rules after it, or around it."""
    _add_placed(name, lambda rate, around: around(make(rate)), **options)


def _add_placed(name: str, place: Any, *, of: tuple[str, ...] = (), **options: Any) -> None:
    assert name not in ROWS
    ROWS[name] = Row(name, of or (name.split("(")[0],), place, **options)


def _dpsgd(rate: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # `seed` is required and deprecated
        return optax.contrib.dpsgd(rate, l2_norm_clip=1.0, noise_multiplier=0.1, seed=0)


def _sam(rate: Any, around: Around = lambda tx: tx, **options: Any) -> Any:
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.2))
    return optax.contrib.sam(around(optax.sgd(rate)), adversary, **options)


def _add_all() -> None:
    c = optax.contrib
    decay = {"weight_decay": 0.1}
    for name in (
        "adabelief adagrad adam adamax amsgrad nadam radam rmsprop sign_sgd signum sm3 "
        "fromage novograd optimistic_gradient_descent optimistic_adam_v2 rprop yogi noisy_sgd"
    ).split():
        make = getattr(optax, name)
        _add(name, lambda rate, make=make: make(rate, **({"key": 0} if make is optax.noisy_sgd else {})))
    for name in "adadelta adamaxw adamw adan lamb lion nadamw".split():
        make = getattr(optax, name)
        _add(name, lambda rate, make=make: make(rate, **decay))
    _add("sgd", optax.sgd)
    _add("sgd(momentum, nesterov)", lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True))
    _add("lars", lambda rate: optax.lars(rate, trust_coefficient=0.5, **decay))
    small = {"min_dim_size_to_factor": 2}
    _add("adafactor", lambda rate: optax.adafactor(rate, **small))
    _add(
        "adafactor(weight_decay_rate)",
        lambda rate: optax.adafactor(rate, weight_decay_rate=0.02, **small),
    )
    _add("optimistic_adam", optax.optimistic_adam)
    _add("optimistic_adam(optimism)", lambda rate: optax.optimistic_adam(rate, optimism=0.05))
    _add("polyak_sgd", lambda rate: optax.polyak_sgd(max_learning_rate=rate), given="value")
    _add(
        "polyak_sgd(scaling)",
        lambda rate: optax.polyak_sgd(max_learning_rate=1.0, scaling=rate),
        given="value",
        rate=0.5,
    )
    _add("lbfgs", lambda rate: optax.lbfgs(rate, memory_size=3), given="value_fn", jit=True)
    _add("lbfgs(linesearch=None)", lambda rate: optax.lbfgs(rate, memory_size=3, linesearch=None))
    _add_placed(
        "lookahead",
        lambda rate, around: around(optax.lookahead(optax.sgd(rate), 2, 0.5)),
        look=True,
    )
    _add_placed(
        "lookahead(rules inside)",
        lambda rate, around: optax.lookahead(around(optax.sgd(rate)), 2, 0.5),
        look=True,
    )
    _add("MultiSteps", lambda rate: optax.MultiSteps(optax.adam(rate), 2).gradient_transformation())
    _add_placed(
        "MultiSteps(rules inside)",
        lambda rate, around: optax.MultiSteps(
            around(optax.adam(rate)), 2
        ).gradient_transformation(),
    )
    _add("apply_if_finite", lambda rate: optax.apply_if_finite(optax.adam(rate), 100))
    _add_placed(
        "apply_if_finite(rules inside)",
        lambda rate, around: optax.apply_if_finite(around(optax.adam(rate)), 100),
    )
    for name in "acprop ademamix adopt madgrad muon simplified_ademamix".split():
        make = getattr(c, name)
        options = {} if name == "simplified_ademamix" else decay
        _add(f"contrib.{name}", lambda rate, make=make, options=options: make(rate, **options))
    _add("contrib.galore", lambda rate: c.galore(rate, rank=2, update_proj_gap=2))
    _add("contrib.cocob", lambda rate: c.cocob(rate, alpha=2.0, **decay), rate=1.0)
    _add("contrib.dadapt_adamw", lambda rate: c.dadapt_adamw(rate, estim_lr0=0.03, **decay), rate=1)
    _add("contrib.dog", lambda rate: c.dog(rate, ("distance", 0.3), **decay), rate=1)
    _add("contrib.dowg", lambda rate: c.dowg(rate, 0.3, **decay), rate=1)
    _add("contrib.prodigy", lambda rate: c.prodigy(rate, estim_lr0=0.03, **decay), rate=1)
    _add("contrib.momo", lambda rate: c.momo(rate, **decay), given="value", rate=0.3)
    _add("contrib.momo_adam", lambda rate: c.momo_adam(rate, **decay), given="value")
    _add("contrib.mechanize", lambda rate: c.mechanize(optax.sgd(rate), s_init=0.3), rate=1)
    _add_placed(
        "contrib.mechanize(rules inside)",
        lambda rate, around: c.mechanize(around(optax.sgd(rate)), s_init=0.3),
        rate=1,
    )
    _add("contrib.dpsgd", _dpsgd, given="per_example")
    _add(
        "contrib.sophia",
        lambda rate: c.sophia(rate, gamma=0.5, update_interval=2, **decay),
        given="obj_fn",
        jit=True,
    )
    _add(
        "contrib.reduce_on_plateau",
        lambda rate: optax.chain(optax.adam(rate), c.reduce_on_plateau(0.5, patience=1)),
        given="value",
    )
    _add("contrib.sam", _sam)
    _add_placed("contrib.sam(rules inside)", _sam)
    _add("contrib.sam(opaque_mode)", lambda rate: _sam(rate, opaque_mode=True), given="grad_fn")
    _add_placed(
        "contrib.sam(opaque_mode, rules inside)",
        lambda rate, around: _sam(rate, around, opaque_mode=True),
        given="grad_fn",
    )
    _add("contrib.schedule_free", lambda rate: c.schedule_free(optax.sgd(rate), rate))
    _add_placed(
        "contrib.schedule_free(rules inside)",
        lambda rate, around: c.schedule_free(around(optax.sgd(rate)), rate),
    )
    _add("contrib.schedule_free_sgd", lambda rate: c.schedule_free_sgd(rate, **decay))
    _add("contrib.schedule_free_adamw", lambda rate: c.schedule_free_adamw(rate, **decay))


_add_all()


# Runs ----------------------------------------------------------------------------------------


def _play(
    row: Row,
    tx: Any,
    spoil: Spoil = CLEAN,
    *,
    jit: bool | None = None,
    cache: dict[int, Any] | None = None,
    narrow: Callable[[Any], Any] = lambda tree: tree,
    widen: Callable[[Any], Any] = lambda tree: tree,
) -> list[Any]:
    """The parameters before the first step and after each."""
    where, bad = spoil
    factors = {n: np.where(where[n], np.float32(bad), np.float32(1)) for n in PARAMS}

    def step(params: Any, state: Any, batch: Any) -> Any:
        grads, extra = _inputs(row.given, params, batch, widen)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    if jit or (jit is None and row.jit):
        step = jax.jit(step) if cache is None else cache.setdefault(id(tx), jax.jit(step))
    params = jax.tree.map(jnp.asarray, narrow(PARAMS))
    if row.look:
        params = optax.LookaheadParams.init_synced(params)
    state = tx.init(params)
    path = [params]
    tx = optax.with_extra_args_support(tx)
    for i in range(STEPS):
        grads = narrow({n: g * factors[n] for n, g in GRADS[i].items()})
        batch = np.float32(i), grads, VALUES[i], factors
        params, state = step(params, state, batch)
        path.append(params)
    return jax.tree.map(np.asarray, path)


def _get(params: Any, name: str) -> list[np.ndarray]:
    return [p[name] for p in params] if isinstance(params, optax.LookaheadParams) else [params[name]]


def _far(path: list[Any], other: list[Any], name: str, part: Any = slice(None)) -> float:
    """The greatest difference between two paths, as a fraction of how far the second leads."""
    apart = gone = 0.0
    for params, others in zip(path, other, strict=True):
        pairs = zip(_get(params, name), _get(others, name), _get(other[0], name), strict=True)
        for leaf, wanted, start in pairs:
            apart = max(apart, float(np.abs(leaf[part] - wanted[-leaf[part].shape[0]:]).max()))
            gone = max(gone, float(np.abs(wanted - start).max()))
    return apart / gone if np.isfinite(apart) and gone else np.inf


def _kept(paths: list[list[Any]], name: str, part: Any) -> str:
    """Whether all that is frozen keeps every bit, or at least every value."""
    words = ["yes"]
    for path in paths:
        for params in path[1:]:
            for leaf, start in zip(_get(params, name), _get(path[0], name), strict=True):
                if leaf[part].tobytes() != start[part].tobytes():
                    words.append("value" if (leaf[part] == start[part]).all() else "no")
    return max(words, key=["yes", "value", "no"].index)


def _same(path: list[Any], other: list[Any]) -> bool:
    """Whether all that trains has the same bits, all of them finite."""
    return all(
        np.isfinite(leaf[part]).all() and leaf[part].tobytes() == wanted[part].tobytes()
        for params, others in zip(path, other, strict=True)
        for name in (*TRAINED, "part")
        for leaf, wanted in zip(_get(params, name), _get(others, name), strict=True)
        for part in [slice(2, None) if name == "part" else slice(None)]
    )


def _by_hand(compact: bool) -> Any:
    """What `wrap` should come to: the tree without what is frozen, scaled and masked by hand."""

    def narrow(tree: Any) -> Any:
        part = tree["part"][2:] if compact else np.where(FROZEN_ROWS, 0, tree["part"])
        return {**{n: tree[n] for n in TRAINED}, "part": np.asarray(part, np.float32)}

    def widen(tree: Any) -> Any:
        part = tree["part"]
        part = jnp.concatenate([jnp.zeros_like(part), part]) if compact else part
        part = jnp.where(FROZEN_ROWS, PARAMS["part"], part)
        return {**tree, "part": part, "frozen": PARAMS["frozen"]}

    def scale(updates: Any, params: Any) -> Any:
        del params
        part = updates["part"] if compact else jnp.where(FROZEN_ROWS, 0, updates["part"])
        return {**updates, "slow": RATIO * updates["slow"], "part": part}

    scaled = optax.stateless(scale)
    return SimpleNamespace(narrow=narrow, widen=widen, around=lambda tx: optax.chain(tx, scaled))


def run(row: Row, log: Callable[[str], None] = lambda line: None) -> tuple[str, ...]:
    """The cells of a row, after its name."""
    rules, worst, part = lm.scale_by_rules(RULES), (ALL_FROZEN, np.nan), slice(0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache: dict[int, Any] = {}
        chained = row.place(row.rate, lambda tx: optax.chain(tx, rules))
        clean = _play(row, chained, cache=cache)
        spoiled = _play(row, chained, worst, cache=cache)
        whole = _play(row, chained, (WHOLE_FROZEN, np.nan), cache=cache)
        plain = _play(row, row.place(RATIO * row.rate, lambda tx: tx))
        far = _far(clean, plain, "slow")
        kept = [_kept([clean, spoiled], "frozen", ...), _kept([clean, spoiled], "part", part)]
        away = "yes" if _same(spoiled, clean) else "array" if _same(whole, clean) else "no"
        moved = [float(np.abs(plain[-1 ]["frozen"] - PARAMS["frozen"]).max())] if not row.look else [1]
        cells = ["yes" if far < PATH_TOLERANCE else "no", *kept, away]
        log(f"{row.name}: rate {far:.1e}, moved {moved[0]:.3f}")
        cells += _run_wrapped(row, log)
    return tuple(cells)


def _run_wrapped(row: Row, log: Callable[[str], None]) -> list[str]:
    cells = []
    for compact in (False, True):
        try:
            cache: dict[int, Any] = {}
            tx = row.place(row.rate, lambda tx: lm.wrap(tx, RULES, compact=compact))
            path = _play(row, tx, (ALL_FROZEN, np.nan), jit=not compact or None, cache=cache)
            kept = [_kept([path], "frozen", ...), _kept([path], "part", slice(0, 2))]
            if not compact:
                large = _play(row, tx, (ALL_FROZEN, 1e6), jit=True, cache=cache)
                kept += [_kept([large], "frozen", ...), _kept([large], "part", slice(0, 2))]
        except Exception as error:
            log(f"  compact={compact}: {type(error).__name__}: {str(error)[:300]}")
            cells += ["error"] if compact else ["error", "error", "error"]
            continue
        hand = _by_hand(compact)
        alone = _play(
            row, row.place(row.rate, hand.around), narrow=hand.narrow, widen=hand.widen
        )
        far = max(
            *(_far(path, alone, name) for name in TRAINED), _far(path, alone, "part", slice(2, None))
        )
        log(f"  compact={compact}: far {far:.1e}")
        equal = "yes" if far < REST_TOLERANCE else "no"
        word = max(kept, key=["yes", "value", "no"].index)
        if compact:
            cells += [equal if word == "yes" else word]
        else:
            cells += [word, "yes" if _same(path, large) else "no", equal]
    return cells
