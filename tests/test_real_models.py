"""Models that others wrote and published, under rules such as people fine-tune them with.

A ViT twice (Flax's names, Equinox's module), a ResNet with BatchNorm, a decoder, and that decoder
with LoRA. `golden/<model>.txt` holds what every parameter of it got, and the printed plan;
`python tests/test_real_models.py` writes these files anew. So that no wrong one slips in, each is
also held against a few lines of plain Python that were written for that one model, and against
the number of parameters that is published for it. Then small ones of the same names take a step.
"""

import functools
import itertools
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrmult as lm
from tests.trees import tree_of

GOLDEN = pathlib.Path(__file__).parent / "golden"


# ViT-B/16, in the names of google-research/vision_transformer -----------------------------------

# `VisionTransformer` of vit_jax/models_vit.py with `get_b16_config` of vit_jax/configs/models.py,
# whose checkpoints `checkpoint.load` brings into these names (in the files on disk the layers of
# a block are numbered through, `MultiHeadDotProductAttention_1`, as before Linen).


def vit():
    width, hidden, heads, classes = 768, 3072, 12, 1000
    shapes = {
        "cls": (1, 1, width),
        "embedding/kernel": (16, 16, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, 14 * 14 + 1, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, classes),
        "head/bias": (classes,),
    }
    for i in range(12):
        block = f"Transformer/encoderblock_{i}"
        for norm, name in itertools.product((0, 1), ("scale", "bias")):
            shapes[f"{block}/LayerNorm_{norm}/{name}"] = (width,)
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for name in ("query", "key", "value"):
            shapes[f"{attention}/{name}/kernel"] = (width, heads, width // heads)
            shapes[f"{attention}/{name}/bias"] = (heads, width // heads)
        shapes[f"{attention}/out/kernel"] = (heads, width // heads, width)
        shapes[f"{attention}/out/bias"] = (width,)
        for layer, (inputs, outputs) in enumerate([(width, hidden), (hidden, width)]):
            shapes[f"{block}/MlpBlock_0/Dense_{layer}/kernel"] = (inputs, outputs)
            shapes[f"{block}/MlpBlock_0/Dense_{layer}/bias"] = (outputs,)
    return tree_of(shapes, jnp.float32)


# Layer-wise decay of the learning rate, as BEiT and MAE fine-tune.
VIT_RULES = [
    ("{embedding,cls}", None),
    ("Transformer/posembed_input", None),
    ("Transformer/encoderblock_[:4]", None),
    ("head", 10),
    ("**/LayerNorm*", 0.05),
    *((f"Transformer/encoderblock_[{i}]", 0.75 ** (12 - i)) for i in range(4, 12)),
]


def vit_by_hand(path):
    if path.startswith("head/"):
        return 10
    if path.startswith("Transformer/encoder_norm/"):
        return 1
    if (found := re.match(r"Transformer/encoderblock_(\d+)/(\w+)_\d/", path)) is None:
        return 0
    block = int(found[1])
    if block < 4:
        return 0
    return 0.05 if found[2] == "LayerNorm" else 0.75 ** (12 - block)


# ViT-B/16, an Equinox module of equimo ----------------------------------------------------------


def equimo_vit():
    from equimo.models.vit import vit_base_patch16_224

    def make():
        return eqx.filter(vit_base_patch16_224(key=jax.random.key(0)), eqx.is_inexact_array)

    return eqx.filter_eval_shape(make)


def equimo_rules(*, frozen=8, head=64):
    return [
        ("{patch_embed,global_pos_embed,cls_token}", None),
        (f"blocks/0/blocks[:{frozen}]", None),
        (lm.neurons("blocks/0/blocks[-1]/attn/qkv", slice(head)), None),  # queries of one head
        ("head", 10),
        ("**/{prenorm,norm}", 0.1),
        ("**/bias", 0.5),
    ]


def equimo_by_hand(path, *, frozen=8, blocks=12, head=64, rows=3 * 768):
    if path.startswith("head/"):
        return 10
    if path.startswith("norm/"):
        return 0.1
    if (found := re.fullmatch(r"blocks/0/blocks/(\d+)/(.+)", path)) is None:
        return 0
    block, rest = int(found[1]), found[2]
    if block < frozen:
        return 0
    if rest.split("/")[0] in ("prenorm", "norm"):
        return 0.1
    rate = 0.5 if rest.endswith("bias") else 1
    if block == blocks - 1 and rest.startswith("attn/qkv/"):
        rates = np.array([0] * head + [rate] * (rows - head))
        return rates if rest.endswith("bias") else rates[:, None]
    return rate


# ResNet-50, of Haiku ----------------------------------------------------------------------------


def resnet():
    net = hk.transform_with_state(lambda x: hk.nets.ResNet50(1000)(x, is_training=True))
    params, _ = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 64, 64, 3)))
    return params


# The statistics of BatchNorm are state and stand in a tree of their own; its scale and offset
# are parameters.
RESNET_RULES = [
    ("res_net50/~/initial_{conv,batchnorm}", None),
    ("res_net50/~/block_group[:2]", None),
    ("**/{scale,offset}", 0.1),
    ("res_net50/~/logits", 10),
    ("res_net50/~/block_group[2]", 0.3),
]


def resnet_by_hand(path):
    kind, _, rest = path.removeprefix("res_net50/~/").partition("/")
    if kind == "logits":
        return 10
    if kind in ("initial_conv", "initial_batchnorm", "block_group_0", "block_group_1"):
        return 0
    if "batchnorm" in rest:
        return 0.1
    return {"block_group_2": 0.3, "block_group_3": 1}[kind]


# Gemma 3 270M, in the names of google-deepmind/gemma --------------------------------------------

# `Gemma3_270M` of gemma/gm/nn/_gemma.py, with the layers of _modules.py beside it.


def gemma(lora=None, *, layers=18, tokens=262_144, width=640, hidden=2048, size=256):
    heads, kv_heads = 4, 1
    shapes = {"embedder/input_embedding": (tokens, width), "final_norm/scale": (width,)}
    for i in range(layers):
        layer = f"layer_{i}"
        for place in ("pre_attention", "post_attention", "pre_ffw", "post_ffw"):
            shapes[f"{layer}/{place}_norm/scale"] = (width,)
        shapes[f"{layer}/attn/_query_norm/scale"] = (size,)
        shapes[f"{layer}/attn/_key_norm/scale"] = (size,)
        shapes[f"{layer}/attn/q_einsum/w"] = (heads, width, size)
        shapes[f"{layer}/attn/kv_einsum/w"] = (2, kv_heads, width, size)
        shapes[f"{layer}/attn/attn_vec_einsum/w"] = (heads, size, width)
        shapes[f"{layer}/mlp/gating_einsum"] = (2, hidden, width)
        shapes[f"{layer}/mlp/linear"] = (hidden, width)
        if lora:  # as gm.nn.LoRA(rank=lora, model=...) of _lora.py adds them to these layers
            adapters = {
                "attn/q_einsum/_LoRAEinsum_0": ((width,), (heads, size)),
                "attn/kv_einsum/_LoRAEinsum_0": ((width,), (2, kv_heads, size)),
                "attn/attn_vec_einsum/_LoRAEinsum_0": ((heads, size), (width,)),
                "mlp/_LoRAEinsum_gating_einsum": ((width,), (2, hidden)),
                "mlp/_LoRAEinsum_linear": ((hidden,), (width,)),
            }
            for name, (inputs, outputs) in adapters.items():
                shapes[f"{layer}/{name}/lora/a"] = (*inputs, lora)
                shapes[f"{layer}/{name}/lora/b"] = (lora, *outputs)
    return tree_of(shapes, jnp.bfloat16)


# Row 6 is <unused0>: the tokenizer keeps such rows for words that its users add.
def gemma_rules(*, frozen=6):
    return [
        (lm.rows("embedder/input_embedding", slice(6, 16)), 2),
        ("embedder", None),
        (f"layer[:{frozen}]", None),
        (lm.along("layer[-1]/attn/{q_einsum,attn_vec_einsum}", 0, [0, 3]), None),  # two heads
        ("**/scale", 0.1),
        ("layer_*/mlp", 0.5),
    ]


def gemma_by_hand(path, *, frozen=6, layers=18, tokens=262_144):
    if path == "embedder/input_embedding":
        return np.array([0] * 6 + [2] * 10 + [0] * (tokens - 16))[:, None]
    if path == "final_norm/scale":
        return 0.1
    layer, _, rest = path.removeprefix("layer_").partition("/")
    if int(layer) < frozen:
        return 0
    if path.endswith("_norm/scale"):
        return 0.1
    if rest in ("mlp/gating_einsum", "mlp/linear"):
        return 0.5
    if int(layer) == layers - 1 and rest in ("attn/q_einsum/w", "attn/attn_vec_einsum/w"):
        return np.array([0, 1, 1, 0])[:, None, None]
    return 1


# LoRA+ (Hayou et al. 2024): b learns 16 times as fast as a, and the model that it adapts is frozen.
LORA_RULES = [("**/lora/a", 1), ("**/lora/b", 16), (..., None)]


def lora_by_hand(path):
    return {"lora/a": 1, "lora/b": 16}.get("/".join(path.split("/")[-2:]), 0)


# What every parameter got -----------------------------------------------------------------------


class Model(NamedTuple):
    params: Callable[[], Any]
    rules: list
    by_hand: Callable[[str], Any]  # the multiplier of a path: a number, or an array that broadcasts
    size: int


# torchvision's documentation has the sizes of ViT-B/16 and ResNet-50 to the digit, and Gemma 3 270M
# was announced with 170 million in its embedding and 100 million in its blocks. LoRA adds its rank
# times (inputs + outputs) for each of the layers q, kv, attn_vec, gating and linear.
LORA_SIZE = 18 * 4 * ((640 + 1024) + (640 + 512) + (1024 + 640) + (640 + 4096) + (2048 + 640))
MODELS = {
    "vit_b16": Model(vit, VIT_RULES, vit_by_hand, 86_567_656),
    "vit_b16_equimo": Model(equimo_vit, equimo_rules(), equimo_by_hand, 86_567_656),
    "resnet50": Model(resnet, RESNET_RULES, resnet_by_hand, 25_557_032),
    "gemma3_270m": Model(gemma, gemma_rules(), gemma_by_hand, 268_098_176),
    "gemma3_270m_lora": Model(
        functools.partial(gemma, 4), LORA_RULES, lora_by_hand, 268_098_176 + LORA_SIZE
    ),
}


@functools.cache
def compiled(name):
    params = MODELS[name].params()
    return params, lm.compile_rules(MODELS[name].rules, params)


def shown(multiplier):
    """`frozen`, `0.5`, or what stands where along the one axis that is ruled."""

    def word(value):
        return "frozen" if value == 0 else f"{value:g}"

    values = np.asarray(multiplier)
    if values.size == 1:
        return word(values.item())
    [axis] = [axis for axis, size in enumerate(values.shape) if size > 1]
    runs, start = [], 0
    for value, run in itertools.groupby(values.ravel().tolist()):
        stop = start + len(list(run))
        runs.append(f"[{':, ' * axis}{start}:{stop}] {word(value)}")
        start = stop
    return ", ".join(runs)


def text_of(plan):
    rows = [
        (
            leaf.path,
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]",
            shown(leaf.multiplier),
            "; ".join(f"rule {index}: {text}" for index, text in leaf.rules) or "no rule",
        )
        for leaf in plan.leaves
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", str(plan), ""])


def paths_and_shapes(params):
    """The arrays of a tree, by the way that JAX prints their paths."""
    return {
        re.sub(r"[.\[\]']+", "/", jax.tree_util.keystr(path)).strip("/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.mark.parametrize("name", MODELS)
def test_what_every_parameter_got_is_as_it_was(name):
    _, plan = compiled(name)
    assert text_of(plan) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_the_golden_file_is_right(name):
    """Against the model's own tree and rules worked out by hand, without a plan."""
    lines, _ = (GOLDEN / f"{name}.txt").read_text().split("\n\n", 1)
    rows = [re.split(r" {2,}", line) for line in lines.splitlines()]
    found = {path: (array, multiplier) for path, array, multiplier, _ in rows}
    params, _ = compiled(name)
    wanted = paths_and_shapes(params)
    assert len(rows) == len(found) == len(jax.tree.leaves(params))
    assert found.keys() == wanted.keys()
    for path, shape in wanted.items():
        array, multiplier = found[path]
        assert array.endswith(f"[{','.join(map(str, shape))}]"), path
        assert multiplier == shown(MODELS[name].by_hand(path)), path


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_is_right(name):
    params, plan = compiled(name)
    assert sum(math.prod(shape) for shape in paths_and_shapes(params).values()) == MODELS[name].size
    assert sum(leaf.trained + leaf.frozen for leaf in plan.leaves) == MODELS[name].size
    for leaf in plan.leaves:
        wanted = np.asarray(MODELS[name].by_hand(leaf.path), float)
        assert np.broadcast_shapes(wanted.shape, leaf.shape) == leaf.shape
        np.testing.assert_array_equal(*np.broadcast_arrays(leaf.multiplier, wanted), leaf.path)
        frozen = int((wanted == 0).sum()) * (math.prod(leaf.shape) // wanted.size)
        assert leaf.frozen == frozen, leaf.path


# A step -----------------------------------------------------------------------------------------


class Trained(NamedTuple):
    params: Any
    loss: Callable[[Any], jax.Array]
    rules: list
    by_hand: Callable[[str], Any]


def random_like(shapes):
    """Made by NumPy: what the models make of a key compiles for longer than they train here."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), shapes
    )


def train_equimo_vit():
    from equimo.models.vit import VisionTransformer

    def make():
        return VisionTransformer(
            img_size=8, in_channels=3, dim=8, patch_size=4, num_heads=2, depths=[2], num_classes=4,
            reg_tokens=0, key=jax.random.key(0),
        )  # fmt: skip

    def is_shape(leaf):
        return isinstance(leaf, jax.ShapeDtypeStruct)

    shapes, rest = eqx.partition(eqx.filter_eval_shape(make), is_shape)

    def loss(params):
        logits = eqx.combine(params, rest)(jnp.ones((3, 8, 8)), jax.random.key(0), inference=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, 1)

    by_hand = functools.partial(equimo_by_hand, frozen=1, blocks=2, head=4, rows=24)
    return Trained(random_like(shapes), loss, equimo_rules(frozen=1, head=4), by_hand)


def train_resnet():
    def forward(images):
        resnet = hk.nets.ResNet(
            (1, 1, 1, 1), 4, bottleneck=False, channels_per_group=(4,) * 4, name="res_net50"
        )
        return resnet(images, is_training=True)

    net = hk.transform_with_state(forward)
    images = random_like(jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32))
    params, state = random_like(jax.eval_shape(net.init, jax.random.key(0), images))

    def loss(params):
        logits, _ = net.apply(params, state, None, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(2)).mean()

    return Trained(params, loss, RESNET_RULES, resnet_by_hand)


def train_gemma(lora=None):
    """Its arrays alone, small and under some loss: the model is not at hand."""
    shapes = gemma(lora, layers=2, tokens=20, width=8, hidden=16, size=4)

    def loss(params):
        return sum(jnp.sin(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(params))

    if lora:
        return Trained(random_like(shapes), loss, LORA_RULES, lora_by_hand)
    by_hand = functools.partial(gemma_by_hand, frozen=1, layers=2, tokens=20)
    return Trained(random_like(shapes), loss, gemma_rules(frozen=1), by_hand)


TRAINED = {
    "equimo vit": train_equimo_vit,
    "resnet": train_resnet,
    "gemma": train_gemma,
    "gemma with lora": functools.partial(train_gemma, 2),
}


def check_moves(trained, after):
    """What the rules freeze, by hand, has every bit that it had, and all other arrays moved."""
    arrays = zip(
        paths_and_shapes(trained.params),
        jax.tree.leaves(trained.params),
        jax.tree.leaves(after),
        strict=True,
    )
    for path, old, new in arrays:
        old, new = np.asarray(old), np.asarray(new)
        frozen = np.broadcast_to(np.asarray(trained.by_hand(path)) == 0, old.shape)
        assert old[frozen].tobytes() == new[frozen].tobytes(), path
        assert frozen.all() or (old != new)[~frozen].any(), path


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_of_wrap_and_of_a_chain(name):
    trained = TRAINED[name]()
    adamw = optax.adamw(0.1, weight_decay=0.1)
    wrapped = lm.wrap(adamw, trained.rules)
    chained = optax.chain(adamw, lm.scale_by_rules(trained.rules))

    @jax.jit  # both in one: what takes long is to compile the gradients
    def step(params):
        grads = jax.grad(trained.loss)(params)

        def stepped(tx):
            updates, state = tx.update(grads, tx.init(params), params)
            return optax.apply_updates(params, updates), state

        return stepped(wrapped), stepped(chained)

    (after_wrap, state), (after_chain, _) = step(trained.params)
    check_moves(trained, after_wrap)
    check_moves(trained, after_chain)
    # No moments are kept for an array that is frozen as a whole.
    moments = sum(leaf.size for leaf in jax.tree.leaves(optax.tree.get(state, "mu")))
    assert moments == sum(
        math.prod(shape)
        for path, shape in paths_and_shapes(trained.params).items()
        if np.any(trained.by_hand(path))
    )


if __name__ == "__main__":
    for model in MODELS:
        (GOLDEN / f"{model}.txt").write_text(text_of(compiled(model)[1]))
