"""A transformer trained on several devices, and what rules do to the compiled step.

A program, for a process that has the devices. ``python -m tests.sharded LAYOUT`` prints facts about
each case as JSON; ``python -m tests.sharded bits ADDRESS COUNT RANK`` trains as one of some
processes, and prints digests of the parameters.
"""

import functools
import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lrmult as lm
from tests.flags import OPTIONS
from tests.programs import collectives, constants

WORDS, WIDTH, HIDDEN, HEADS, LENGTH, BATCH = 64, 64, 128, 8, 8, 16
SIZES = {
    "embed/embedding": (WORDS, WIDTH),
    "block/norm/scale": (WIDTH,),
    "block/query/kernel": (WIDTH, HEADS, WIDTH // HEADS),
    "block/out/kernel": (HEADS, WIDTH // HEADS, WIDTH),
    "block/up/kernel": (WIDTH, HIDDEN),
    "block/up/bias": (HIDDEN,),
    "block/down/kernel": (HIDDEN, WIDTH),
    "block/down/bias": (WIDTH,),
    "head/kernel": (WIDTH, WORDS),
}

# By layout, the axes of the mesh, and how arrays lie on them if they are not on every device.
MESHES = {"data": {"data": 8}, "fsdp": {"data": 8}, "tensor": {"data": 2, "model": 4}}
SPECS = {
    "data": {},
    "fsdp": {path: P("data") for path in SIZES} | {"block/out/kernel": P(None, "data")},
    "tensor": {
        "block/query/kernel": P(None, "model"),
        "block/out/kernel": P("model"),
        "block/up/kernel": P(None, "model"),
        "block/up/bias": P("model"),
        "block/down/kernel": P("model"),
    },
}

# Whole arrays and parts of them, along what is sharded and along what is not.
MASKED = "block/up/kernel"
MASK = np.add.outer(np.arange(WIDTH), np.arange(HIDDEN)) % 3 == 0
RULES = [
    (lm.rows("embed", slice(8, None)), None),
    (lm.along("block/out/kernel", 0, 1), None),
    (lm.elements(MASKED, MASK), None),
    (lm.neurons("block/up", [0, 5, 17]), 0.5),
    (lm.rows("block/down/kernel", slice(4)), lambda step: 1 / (1 + step)),
    ("block/query", None),
    ("block/norm", 2.0),
    ("block/down", lambda step: jnp.where(step == 0, 0.0, 0.5)),
    (lm.rows("head", [0, 3]), 0.5),
    (lm.along("head/kernel", 1, slice(8)), None),
    ("head", 0.1),
]
# No layout shards this axis, so that every device can cut what it has.
CUT = [(lm.along("block/{query,out}/kernel", 2, slice(4)), None), ("embed", None)]

ADAMW = optax.adamw(1e-2, eps=1e-2)  # a large eps, or it makes much of what rounding leaves
CASES = {
    "plain": ([], ADAMW),
    "chain": (RULES, optax.chain(ADAMW, lm.scale_by_rules(RULES))),
    "wrap": (RULES, lm.wrap(ADAMW, RULES)),
    "compact": (CUT, lm.wrap(ADAMW, CUT, compact=True)),
}
MODES = {
    "auto": ("plain", "chain", "wrap", "compact"),
    "explicit": ("plain", "chain", "wrap", "compact"),
    "mapped": ("plain", "chain", "wrap", "compact"),
}


def tree_of(leaf_of):
    """The parameters, or what takes their place."""
    tree = {}
    for path in SIZES:
        *above, name = path.split("/")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), above, tree)
        node[name] = leaf_of(path)
    return tree


def new_params():
    rng = np.random.default_rng(0)

    def leaf_of(path):
        if path.endswith("scale"):
            return np.ones(SIZES[path], jnp.bfloat16)
        return rng.normal(0, 0.2, SIZES[path]).astype(np.float32)

    return tree_of(leaf_of)


def new_batch():
    return np.random.default_rng(1).integers(0, WORDS, (BATCH, LENGTH + 1))


# ---- the model -----------------------------------------------------------------------------------


class Placing:
    """How a layout places what a model computes, in a sharding mode; nowhere in mode "one".

    In mode "mapped" the model is inside `jax.shard_map`, and sees the blocks of one device.
    """

    def __init__(self, layout, mode):
        self.layout, self.mode = layout, mode
        self.model = "model" if layout == "tensor" else None

    def place(self, array, *spec):
        if self.mode == "auto":
            return jax.lax.with_sharding_constraint(array, P(*spec))
        return jax.sharding.reshard(array, P(*spec)) if self.mode == "explicit" else array

    def product(self, subscripts, one, other, *spec):
        if self.mode == "explicit":
            return jnp.einsum(subscripts, one, other, out_sharding=P(*spec))
        return self.place(jnp.einsum(subscripts, one, other), *spec)

    def summed(self, array):
        """The sum of what the devices of an axis have."""
        by_hand = self.mode == "mapped" and self.model
        return jax.lax.psum(array, self.model) if by_hand else array

    def whole(self, path, array):
        """A parameter for use: FSDP gathers it."""
        if self.layout != "fsdp":
            return array
        if self.mode != "mapped":
            return self.place(array)
        axis = SPECS["fsdp"][path].index("data")
        return jax.lax.all_gather(array, "data", axis=axis, tiled=True)


def loss_of(placing):
    """The loss of the transformer, a function of parameters and batch."""
    product, model = placing.product, placing.model

    def loss(params, batch):
        def use(path):
            return placing.whole(path, lm.extract(params, path).astype(jnp.float32))

        words = jax.nn.one_hot(batch, WORDS)
        x = product("btv,vd->btd", words[:, :-1], use("embed/embedding"), "data")
        y = x * use("block/norm/scale")
        q = product("btd,dhk->bthk", y, use("block/query/kernel"), "data", None, model)
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, q))
        y = jnp.einsum("bhts,bshk->bthk", weights, q)
        x += placing.summed(product("bthk,hkd->btd", y, use("block/out/kernel"), "data"))
        y = product("btd,df->btf", x, use("block/up/kernel"), "data", None, model)
        y = jnp.tanh(y + use("block/up/bias"))
        y = placing.summed(product("btf,fd->btd", y, use("block/down/kernel"), "data"))
        x += y + use("block/down/bias")
        logits = jax.nn.log_softmax(product("btd,dv->btv", x, use("head/kernel"), "data"))
        mean = -jnp.mean(jnp.sum(logits * words[:, 1:], axis=-1))
        return jax.lax.pmean(mean, "data") if placing.mode == "mapped" else mean

    return loss


# ---- training ------------------------------------------------------------------------------------


def use_mesh(mode, axes):
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    kinds = (kind,) * len(axes)
    return jax.set_mesh(jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds))


def on_mesh(array, spec):
    return jax.device_put(array, NamedSharding(jax.sharding.get_mesh(), spec))


def start(layout, case):
    """Parameters, state and batch on the devices."""
    host = new_params()
    specs = SPECS[layout]
    params = tree_of(lambda path: on_mesh(lm.extract(host, path), specs.get(path, P())))
    state = CASES[case][1].init(params)
    return params, state, on_mesh(new_batch(), P("data"))


def step_of(layout, mode, case, traces):
    """A step of training, which notes when it is traced."""
    tx = CASES[case][1]
    gradient = jax.value_and_grad(loss_of(Placing(layout, mode)))
    if mode == "mapped" and SPECS[layout]:
        specs = tree_of(lambda path: SPECS[layout].get(path, P()))
        gradient = jax.shard_map(gradient, in_specs=(specs, P("data")), out_specs=(P(), specs))

    def step(params, state, batch):
        traces.append(case)
        loss, grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates, loss

    if mode == "mapped" and not SPECS[layout]:  # rules and all, since no array is split
        step = jax.shard_map(step, in_specs=(P(), P(), P("data")), out_specs=P())
    return jax.jit(step, compiler_options=OPTIONS)


def train(step, params, state, batch):
    """What comes of three steps, and the last updates."""
    for _ in range(3):
        params, state, updates, _ = step(params, state, batch)
    return params, state, updates


@functools.cache
def trained_by_one(case):
    """The parameters after training on one device."""
    params = jax.tree.map(jnp.asarray, new_params())
    state = CASES[case][1].init(params)
    return train(step_of("data", "one", case, []), params, state, new_batch())[0]


# ---- what is found -------------------------------------------------------------------------------


def by_path(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def moved(before, after):
    """The arrays that lie elsewhere than those of the same path before, or have another dtype."""
    old = by_path(before)
    return {
        path: f"from {old[path].dtype} {old[path].sharding} to {new.dtype} {new.sharding}"
        for path, new in by_path(after).items()
        if new.dtype != old[path].dtype
        or not new.sharding.is_equivalent_to(old[path].sharding, new.ndim)
    }


def apart(tree, other):
    """The largest difference of two trees."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.subtract(*pair, dtype=np.float64)).max()) for pair in pairs)


def facts(layout, mode, case):
    """What is to be said of a case."""
    traces = []
    params, state, batch = start(layout, case)
    step = step_of(layout, mode, case, traces)
    after, last, updates = train(step, params, state, batch)
    lowered = step.lower(params, state, batch)
    lm.assert_frozen(params, after, CASES[case][0])
    places = {"params": moved(params, after), "state": moved(state, last)}
    places |= {name: moved(params, optax.tree.get(last, name)) for name in ("mu", "nu")}
    array = lm.extract(params, MASKED)
    for bits in optax.tree.get(last, "rules_masks") or ():
        if not bits.sharding.is_equivalent_to(array.sharding, bits.ndim):
            places["masks"] = {MASKED: f"from {array.sharding} to {bits.sharding}"}
    return {
        "collectives": collectives(lowered.compile()),
        "traces": len(traces),
        "largest constant": max(constants(lowered), default=0),
        "apart": apart(after, trained_by_one(case)),
        "moved": places | {"updates": moved(params, updates)},
    }


def main(layout):
    """Print the facts of a layout."""
    found = {}
    for mode, cases in MODES.items():
        with use_mesh(mode, MESHES[layout]):
            found |= {f"{mode} {case}": facts(layout, mode, case) for case in cases}
    print(json.dumps(found))


# ---- several processes ---------------------------------------------------------------------------

# Never more than two devices add their numbers, in whatever order.
TWO_BY_TWO = {"data": 2, "model": 2}
TOGETHER = (("fsdp", "chain"), ("tensor", "wrap"))


def digest(params):
    """All bits of the parameters in short."""
    everywhere = NamedSharding(jax.sharding.get_mesh(), P())
    whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(params)
    leaf_bytes = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(whole)]
    return hashlib.sha256(b"".join(leaf_bytes)).hexdigest()


def check_here(before, after, rules):
    """Each process compares what it holds."""
    for known in (before, new_params()):
        lm.assert_frozen(known, after, rules)
        try:
            lm.assert_frozen(known, after, [("block/up/kernel", None)])
        except lm.FrozenError:
            continue
        raise AssertionError("what trained was not seen to change")


def bits(address, count, rank):
    """Print what comes of training as one of some processes with four devices in all."""
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, rank, initialization_timeout=120)
    assert (jax.process_count(), jax.device_count()) == (count, 4)
    digests = []
    with use_mesh("auto", TWO_BY_TWO):
        for layout, case in TOGETHER:
            step = step_of(layout, "auto", case, [])
            params, state, batch = start(layout, case)
            after, _, _ = train(step, params, state, batch)
            check_here(params, after, CASES[case][0])
            digests.append(digest(after))
    print(json.dumps(digests))


if __name__ == "__main__":
    if sys.argv[1] == "bits":
        bits(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(sys.argv[1])
