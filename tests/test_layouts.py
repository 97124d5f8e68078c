"""`neurons` on real layers: what they do shows the axis to be right, or it must be given."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lrmult as lm

KEY = jax.random.key(0)


class Layer(NamedTuple):
    """A layer in a tree, and what it computes: its output units along the last axis."""

    params: Any
    call: Callable[[Any], jax.Array]
    target: str


class Case(NamedTuple):
    build: Callable[[], Layer]
    axis: int | None  # the output axis of the largest array; None where none serves all arrays
    asks: bool = False
    gates: int = 1  # how many outputs of the arrays make one unit of the layer


def noise(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def filled(shapes):
    """Numbers in place of shapes: no initialiser needs to run."""
    return jax.tree.map(lambda x: 0.5 + noise(*x.shape) / 8 if hasattr(x, "shape") else x, shapes)


# The libraries ----------------------------------------------------------------------------------


def run(layer, inputs):
    out = layer(*inputs) if isinstance(inputs, tuple) else layer(inputs)
    return out[-1] if isinstance(out, tuple) else out


def linen(make, inputs, at=None, target=None):
    """A layer that Linen names after its class, unless it has a name; or the layer `at` in it."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return run(make(), inputs)

    variables = filled(jax.eval_shape(Net().init, KEY, inputs))
    name, *_ = variables["params"]

    def call(params):
        every = {**variables, "params": params}
        if at is None:
            return Net().apply(every, inputs)
        _, seen = Net().apply(every, inputs, capture_intermediates=True)
        return seen["intermediates"][name][at]["__call__"][0]

    return Layer(variables["params"], call, target or (f"{name}/{at}" if at else name))


def of_nnx(make, inputs, at=None, target=None):
    graph, params, rest = nnx.split(nnx.Dict(layer=make(nnx.Rngs(0))), nnx.Param, ...)

    def call(params):
        layer = nnx.merge(graph, params, rest)["layer"]
        return run(getattr(layer, at) if at else layer, inputs)

    return Layer(filled(params), call, target or (f"layer/{at}" if at else "layer"))


def haiku(make, inputs, target=None, units=-1):
    net = hk.transform_with_state(lambda x: make()(x))
    params, state = filled(jax.eval_shape(net.init, KEY, inputs))

    def call(params):
        out = net.apply(params, state, KEY, inputs)[0]
        return jnp.moveaxis(out[0] if isinstance(out, tuple) else out, units, -1)

    return Layer(params, call, target or next(iter(params)))


def equinox(make, inputs, at="", keep=eqx.is_inexact_array, target=None):
    params, static = eqx.partition({"layer": filled(eqx.filter_eval_shape(make))}, keep)

    def call(params):
        layer = eqx.combine(params, static)["layer"]
        return jnp.moveaxis(run(getattr(layer, at) if at else layer, inputs), 0, -1)

    return Layer(params, call, target or (f"layer/{at}" if at else "layer"))


def plain(function, *shape):
    params = {"fc": {"weight": noise(*shape), "bias": noise(3)}}
    return Layer(params, lambda params: function(**params["fc"]), "fc")


class Own(eqx.Module):
    """Holds its inputs first, as no layer of Equinox does."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return x @ self.weight + self.bias


def attend_linen(**options):
    return nn.MultiHeadDotProductAttention(2, qkv_features=6, normalize_qk=True, **options)


def attend_nnx(rngs, **options):
    return nnx.MultiHeadAttention(2, 4, 6, decode=False, rngs=rngs, **options)


def attend_equinox():
    return eqx.nn.MultiheadAttention(2, 4, use_value_bias=True, key=KEY)


def channels_first(make):
    return haiku(lambda: make(3, 2, data_format="NCHW"), IMAGE, units=1)


def linear(keep):
    return equinox(lambda: eqx.nn.Linear(3, 3, key=KEY), noise(3), keep=keep)


ASKS, PLAIN, OUT_IN, K = True, {"use_bias": False}, {"transpose_kernel": True}, {"key": KEY}
VECTOR, SQUARE, SERIES, IMAGE = noise(2, 4), noise(2, 3), noise(2, 6, 4), noise(2, 5, 5, 4)
STATE = noise(2, 3)
LSTM = (STATE, STATE / 2), VECTOR
HEADS = noise(2, 5, 2, 3)
TOKENS = np.arange(3)

# Name: how it is made, its input, its output axis, whether that must be given; see `Case`.
LINEN = {
    "Dense": (lambda: nn.Dense(3), VECTOR, -1),
    "Dense, square, no bias": (lambda: nn.Dense(3, name="fc", **PLAIN), SQUARE, -1),
    "Conv 1-D": (lambda: nn.Conv(3, (2,), name="c"), SERIES, -1),
    "Conv 2-D": (lambda: nn.Conv(3, (3, 2), name="c"), IMAGE, -1),
    "Conv, square": (lambda: nn.Conv(4, (2, 2)), IMAGE, -1),
    "Conv, square, own name": (lambda: nn.Conv(4, (2, 2), name="c"), IMAGE, -1, ASKS),
    "Conv, no bias": (lambda: nn.Conv(3, (2,), **PLAIN), SERIES, -1),
    "Conv, no bias, own name": (lambda: nn.Conv(3, (2,), name="c", **PLAIN), SERIES, -1, ASKS),
    "Conv, depthwise": (lambda: nn.Conv(8, (2,), feature_group_count=4), SERIES, -1),
    "ConvLocal": (lambda: nn.ConvLocal(3, (2,)), SERIES, -1, ASKS),
    "ConvT": (lambda: nn.ConvTranspose(3, (2, 2)), IMAGE, -1),
    "ConvT, square": (lambda: nn.ConvTranspose(4, (2, 2)), IMAGE, -1, ASKS),
    "ConvT -2": (lambda: nn.ConvTranspose(3, (2, 2), **OUT_IN), IMAGE, -2),
    "ConvT -2, square": (lambda: nn.ConvTranspose(4, (2,), **OUT_IN), SERIES, -2, ASKS),
    "ConvT -2, no bias": (lambda: nn.ConvTranspose(3, (2,), **OUT_IN, **PLAIN), SERIES, -2, ASKS),
    "DenseGeneral": (lambda: nn.DenseGeneral((2, 5), (-2, -1)), HEADS, -1),
    "DenseGeneral, no bias": (lambda: nn.DenseGeneral((5, 5), **PLAIN), VECTOR, -1),
    "Einsum, (out, in)": (lambda: nn.Einsum((3, 4), "ba,ca->bc"), VECTOR, 0, ASKS),
    "Einsum, (out, in), square": (lambda: nn.Einsum((3, 3), "ba,ca->bc"), SQUARE, 0, ASKS),
    "Embed": (lambda: nn.Embed(5, 3), TOKENS, -1, ASKS),
    "LayerNorm": (lambda: nn.LayerNorm(), SERIES, -1),
    "BatchNorm": (lambda: nn.BatchNorm(True), IMAGE, -1),
    "GroupNorm": (lambda: nn.GroupNorm(2), IMAGE, -1),
    "WeightNorm": (lambda: nn.WeightNorm(nn.Dense(3)), VECTOR, -1, not ASKS, 1, "*"),
    "LSTMCell": (lambda: nn.LSTMCell(3), LSTM, -1),
    "GRUCell": (lambda: nn.GRUCell(3), (STATE, VECTOR), -1),
}  # fmt: skip
NNX = {
    "Linear": (lambda r: nnx.Linear(4, 3, rngs=r), VECTOR, -1),
    "Linear, square, no bias": (lambda r: nnx.Linear(3, 3, rngs=r, **PLAIN), SQUARE, -1),
    "LinearGeneral": (lambda r: nnx.LinearGeneral(4, (2, 3), rngs=r), VECTOR, -1),
    "Conv": (lambda r: nnx.Conv(4, 3, (2, 2), rngs=r), IMAGE, -1),
    "Conv, square": (lambda r: nnx.Conv(4, 4, (2,), rngs=r), SERIES, -1, ASKS),
    "Conv, no bias": (lambda r: nnx.Conv(4, 3, (2,), rngs=r, **PLAIN), SERIES, -1, ASKS),
    "ConvT": (lambda r: nnx.ConvTranspose(4, 3, (2,), rngs=r), SERIES, -1),
    "ConvT -2": (lambda r: nnx.ConvTranspose(4, 3, (2, 2), rngs=r, **OUT_IN), IMAGE, -2),
    "ConvT, square": (lambda r: nnx.ConvTranspose(4, 4, (2,), rngs=r, **OUT_IN), SERIES, -2, ASKS),
    "Einsum": (lambda r: nnx.Einsum("bta,hac->bthc", (2, 4, 3), (2, 3), rngs=r), SERIES, -1, ASKS),
    "Einsum, heads last": (
        lambda r: nnx.Einsum("bta,hac->btch", (4, 4, 3), (3, 4), rngs=r), SERIES, None, ASKS,
    ),
    "Embed": (lambda r: nnx.Embed(5, 3, rngs=r), TOKENS, -1, ASKS),
    "LayerNorm": (lambda r: nnx.LayerNorm(4, rngs=r), SERIES, -1),
    "BatchNorm": (lambda r: nnx.BatchNorm(4, use_running_average=True, rngs=r), IMAGE, -1),
    "LSTMCell": (lambda r: nnx.LSTMCell(4, 3, rngs=r), LSTM, -1),
    "Optimized": (lambda r: nnx.OptimizedLSTMCell(4, 3, rngs=r), LSTM, -1, not ASKS, 4),
    "GRUCell": (lambda r: nnx.GRUCell(4, 3, rngs=r), (STATE, VECTOR), -1, not ASKS, 3),
    "WeightNorm": (lambda r: nnx.WeightNorm(nnx.Linear(4, 3, rngs=r), rngs=r), VECTOR, -1),
    "LoRA": (lambda r: nnx.LoRA(4, 3, 3, rngs=r), VECTOR, None, ASKS),
}  # fmt: skip
HAIKU = {
    "Linear": (lambda: hk.Linear(3), VECTOR, -1),
    "Linear, square, no bias": (lambda: hk.Linear(3, with_bias=False), SQUARE, -1),
    "Conv1D": (lambda: hk.Conv1D(3, 2), SERIES, -1),
    "Conv2D, square": (lambda: hk.Conv2D(4, 2), IMAGE, -1),
    "Conv2D, square, own name": (lambda: hk.Conv2D(4, 2, name="c"), IMAGE, -1, ASKS),
    "Conv2D, square, no bias": (lambda: hk.Conv2D(4, 2, with_bias=False), IMAGE, -1),
    "Conv2DT": (lambda: hk.Conv2DTranspose(3, 2), IMAGE, -2),
    "Conv2DT, square": (lambda: hk.Conv2DTranspose(4, 2), IMAGE, -2, ASKS),
    "Conv1DT, no bias": (lambda: hk.Conv1DTranspose(3, 2, with_bias=False), SERIES, -2, ASKS),
    "DepthwiseConv2D": (lambda: hk.DepthwiseConv2D(2, 2), IMAGE, -1),
    "LayerNorm": (lambda: hk.LayerNorm(-1, True, True), SERIES, -1),
    "BatchNorm": (lambda: partial(hk.BatchNorm(True, True, 0.9), is_training=True), IMAGE, -1),
    "Embed": (lambda: hk.Embed(5, 3), TOKENS, -1, ASKS),
    "LSTM": (lambda: lambda x: hk.LSTM(3)(x, hk.LSTMState(*LSTM[0])), VECTOR, -1, not ASKS, 4),
    "GRU": (lambda: lambda x: hk.GRU(3)(x, STATE), VECTOR, None, ASKS),
}  # fmt: skip
EQUINOX = {
    "Linear": (lambda: eqx.nn.Linear(4, 3, **K), noise(4), 0),
    "Linear, square, no bias": (lambda: eqx.nn.Linear(3, 3, **K, **PLAIN), noise(3), 0),
    "MLP": (lambda: eqx.nn.MLP(4, 3, 3, 2, **K), noise(4), 0, not ASKS, 1, "layer/layers[-1]"),
    "Conv1d": (lambda: eqx.nn.Conv1d(4, 3, 2, **K), noise(4, 6), 0),
    "Conv2d, square": (lambda: eqx.nn.Conv2d(4, 4, 2, **K), noise(4, 6, 6), 0),
    "Conv2d, no bias": (lambda: eqx.nn.Conv2d(4, 4, 4, **K, **PLAIN), noise(4, 6, 6), 0),
    "Conv1d, in groups": (lambda: eqx.nn.Conv1d(4, 6, 2, groups=2, **K), noise(4, 6), 0),
    "ConvT1d": (lambda: eqx.nn.ConvTranspose1d(4, 3, 2, **K), noise(4, 6), 0),
    "ConvT2d": (lambda: eqx.nn.ConvTranspose2d(4, 4, 2, **K, **PLAIN), noise(4, 5, 5), 0),
    "LayerNorm": (lambda: eqx.nn.LayerNorm(4), noise(4), 0),
    "LayerNorm, 2 axes": (lambda: eqx.nn.LayerNorm((4, 4)), noise(4, 4), 0, ASKS),
    "GroupNorm": (lambda: eqx.nn.GroupNorm(2, 4), noise(4, 5, 5), 0),
    "WeightNorm": (lambda: eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, **K)), noise(4), 0, ASKS),
    "Embedding": (lambda: eqx.nn.Embedding(5, 3, **K), np.array(2), -1, ASKS),
    "Embedding, square": (lambda: eqx.nn.Embedding(3, 3, **K), np.array(2), -1, ASKS),
    "LSTMCell": (lambda: eqx.nn.LSTMCell(4, 3, **K), (noise(4), (STATE[0],) * 2), 0, ASKS, 4),
    "GRUCell": (lambda: eqx.nn.GRUCell(4, 3, **K), (noise(4), STATE[0]), None, ASKS),
    "own layer": (lambda: Own(jnp.ones((4, 3)), jnp.ones(3)), noise(4), 1),
    "own layer, square": (lambda: Own(jnp.ones((3, 3)), jnp.ones(3)), noise(3), 1, ASKS),
}  # fmt: skip
LIBRARIES = {linen: LINEN, of_nnx: NNX, haiku: HAIKU, equinox: EQUINOX}
CASES = {
    f"{library.__name__}: {name}": Case(
        partial(library, make, inputs, target=(expected[2:] or [None])[0]), axis, *expected[:2]
    )
    for library, rows in LIBRARIES.items()
    for name, (make, inputs, axis, *expected) in rows.items()
}
ATTENTION = [
    *[(linen, attend_linen, SERIES, at) for at in ("query", "key", "value", "out", "query_ln")],
    *[(of_nnx, attend_nnx, HEADS if at == "out" else SERIES, at) for at in ("query", "key", "out")],
]
CASES |= {
    f"{library.__name__}: {at}{options or ''}": Case(
        partial(library, partial(make, **options), inputs, at), -1
    )
    for library, make, inputs, at in ATTENTION
    for options in ({}, PLAIN)
}
CASES |= {
    "equinox: query": Case(lambda: equinox(attend_equinox, noise(4), "query_proj"), 0),
    "equinox: value": Case(lambda: equinox(attend_equinox, noise(4), "value_proj"), 0),
    "equinox: kernel alone": Case(lambda: linear(lambda leaf: leaf.ndim == 2), 0),
    "haiku: Conv2D, channels first": Case(lambda: channels_first(hk.Conv2D), -1),
    "haiku: Conv2DT, channels first": Case(lambda: channels_first(hk.Conv2DTranspose), -2),
    "plain: (out, in)": Case(lambda: plain(lambda weight, bias: VECTOR @ weight.T + bias, 3, 4), 0),
    "plain: (in, out)": Case(lambda: plain(lambda weight, bias: VECTOR @ weight + bias, 4, 3), 1),
    "plain: 3 x 3": Case(lambda: plain(lambda weight, bias: SQUARE @ weight + bias, 3, 3), 1, ASKS),
}


# What layers do ---------------------------------------------------------------------------------


def marks(params, *parts):
    """Per array, a mask of what some parts name."""
    plan = lm.compile_rules([(part, None) for part in parts], params)
    masks = [
        mask.dense() if isinstance(mask, lm.Parts) else np.broadcast_to(mask, array.shape)
        for mask, array in zip(jax.tree.leaves(plan.frozen), jax.tree.leaves(params), strict=True)
    ]
    assert [int(mask.sum()) for mask in masks] == [leaf.frozen for leaf in plan.leaves]
    return masks


def assert_are_unit(layer, unit, *parts):
    """What the parts name moves this output unit alone, and nothing else below moves it."""
    before = np.asarray(layer.call(layer.params))
    arrays, treedef = jax.tree.flatten(layer.params)
    marked = marks(layer.params, *parts)
    below = marks(layer.params, layer.target)

    def moved(number, mask):
        changed = np.where(mask, arrays[number] + 0.5 + np.abs(noise(*mask.shape)), arrays[number])
        after = layer.call(treedef.unflatten([*arrays[:number], changed, *arrays[number + 1 :]]))
        return set(np.nonzero(np.abs(after - before) > 1e-5)[-1].tolist())

    for number, path in enumerate(lm.paths(layer.params)):
        mask, others = marked[number], below[number] & ~marked[number]
        assert not (mask & ~below[number]).any(), path
        assert mask.any() == below[number].any(), path
        if mask.any():
            assert moved(number, mask) == {unit}, path
        if others.any():
            assert unit not in moved(number, others), path


def units(layer, gates=1):
    """The first and the last output unit, each with the index of its outputs in the arrays."""
    size = jax.eval_shape(layer.call, layer.params).shape[-1]
    return [(unit, [unit + gate * size for gate in range(gates)]) for unit in (0, size - 1)]


@pytest.mark.parametrize("name", CASES)
def test_neurons_are_output_units_or_their_axis_must_be_given(name):
    build, axis, asks, gates = CASES[name]
    layer = build()
    layer = layer._replace(call=jax.jit(layer.call))
    if asks:
        with pytest.raises(lm.AxisError, match="axis="):
            marks(layer.params, lm.neurons(layer.target, 0))
    for unit, index in units(layer, gates) if axis is not None else ():
        given = lm.neurons(layer.target, index, axis=axis)
        assert_are_unit(layer, unit, given)
        if not asks:
            told = marks(layer.params, lm.neurons(layer.target, index))
            chex.assert_trees_all_equal(told, marks(layer.params, given))


def test_lora_is_named_array_by_array():
    layer = of_nnx(lambda r: nnx.LoRALinear(4, 3, lora_rank=3, rngs=r), VECTOR)
    layer = layer._replace(target="layer/**/{kernel,bias,lora_b}")
    for unit, index in units(layer):
        linear = lm.neurons("layer/{kernel,bias}", index)
        assert_are_unit(layer, unit, linear, lm.neurons("layer/lora/lora_b", index, axis=-1))


def test_gru_of_equinox_is_named_array_by_array():
    layer = CASES["equinox: GRUCell"].build()
    with pytest.raises(lm.AxisError, match=r"bias_n.* write .*lrmult.along\(target, axis, index\)"):
        marks(layer.params, lm.neurons("layer", [0, 3, 6], axis=0))
    for unit, index in units(layer, gates=3):
        gates = lm.along("layer/{weight_ih,weight_hh,bias}", 0, index)
        assert_are_unit(layer, unit, gates, lm.along("layer/bias_n", 0, unit))
