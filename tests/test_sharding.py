"""Training on many devices costs with rules what it costs without."""

import collections
import json
import socket

import pytest

from tests import sharded
from tests.devices import printed_on_devices, printed_on_four_devices, printed_together

FEWER = ("wrap", "compact")  # the array that is frozen whole has no gradient to be summed
QUERY, EMBEDDING = "['block']['query']['kernel']", "['embed']['embedding']"
FROZEN = {"plain": set(), "chain": {QUERY}, "wrap": {QUERY}, "compact": {EMBEDDING}}


def complaints(mode, case, plain, facts):
    """What is wrong with a case."""
    wrong = {}
    before, after = (collections.Counter(each["collectives"]) for each in (plain, facts))
    if after - before or (before - after).total() != (case in FEWER):
        wrong["collectives"] = f"added {dict(after - before)}, lacks {dict(before - after)}"
    if facts["traces"] != 1:
        wrong["traces"] = facts["traces"]
    # A vector along an axis; the bits of the element mask would be twice as much.
    if facts["largest constant"] > 4 * sharded.HIDDEN:
        wrong["largest constant"] = facts["largest constant"]
    if not facts["apart"] < 1e-6:
        wrong["apart from one device"] = facts["apart"]
    if mode != "explicit":
        # A constant that leaves the program lies where XLA likes; added to its array, it is gone.
        for path in FROZEN[case]:
            facts["moved"]["updates"].pop(path, None)
    return wrong | {name: paths for name, paths in facts["moved"].items() if paths}


@pytest.mark.parametrize("layout", ["data", "fsdp", "tensor"])
def test_rules_add_no_communication_and_leave_all_in_its_place(layout):
    found = json.loads(printed_on_devices(8, "-m", "tests.sharded", layout))
    assert found.keys() == {
        f"{mode} {case}" for mode in sharded.MODES for case in sharded.MODES[mode]
    }
    for name, facts in found.items():
        mode, case = name.split()
        plain = found[f"{mode} plain"]
        assert plain["collectives"]
        assert not complaints(mode, case, plain, facts), name


BLOCKS = """
import jax, jax.numpy as jnp, optax, lrmult as lm
from jax.sharding import AxisType, PartitionSpec as P
tx = lm.scale_by_rules([(lm.rows("w", 0), None), ("v", 0.5)])
update = lambda grads: tx.update(grads, optax.EmptyState())[0]
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
out = jax.shard_map(update, mesh=mesh, in_specs=P("x"), out_specs=P("x"))(
    {"v": jnp.ones(8), "w": jnp.ones(8)}
)
print(*map(int, out["w"]), *map(float, out["v"]))
"""


def test_inside_shard_map_parts_are_counted_within_each_block():
    assert printed_on_four_devices(BLOCKS).split() == ["0", "1"] * 4 + ["0.5"] * 8


MASKS = """
import jax, jax.numpy as jnp, numpy as np, optax, lrmult as lm
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
for kind in AxisType.Auto, AxisType.Explicit:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    wide = (64, P("x", "y")), (64, P(None, ("x", "y")))
    for width, spec in (*wide, (12, P("x", "y")), (8, P("y"))):
        bits = np.add.outer(np.arange(8), np.arange(width)) % 3 == 0
        with jax.set_mesh(mesh):
            params = {"w": jax.device_put(jnp.ones((8, width)), NamedSharding(mesh, spec))}
            for tx in (
                optax.chain(optax.sgd(1.0), lm.scale_by_rules([(lm.elements("w", bits), None)])),
                lm.wrap(optax.sgd(1.0), [(lm.elements("w", bits), None)]),
            ):
                for init in (tx.init, jax.jit(tx.init)):
                    state = init(params)
                    updates, _ = jax.jit(tx.update)(params, state, params)
                    assert np.array_equal(updates["w"], np.where(bits, 0, -1))
                    assert updates["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
                    [placed] = optax.tree.get(state, "rules_masks")
                    if init == tx.init or kind == AxisType.Explicit:
                        print(*placed.sharding.spec, sep=",")
"""


def test_masks_lie_as_their_arrays_do():
    # In automatic mode what `init` makes within `jit` lies where XLA likes. Of twelve columns on
    # two devices each has six, which are no whole byte.
    each = ["x,y", "None,('x', 'y')", "x,None", "y,None"]
    wanted = [spec for times in (2, 4) for spec in each for _ in range(times)]
    assert printed_on_four_devices(MASKS).splitlines() == wanted


def test_two_processes_train_the_same_bits_as_one():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = "-m", "tests.sharded", "bits", address
    runs = (4, *program, "1", "0"), (2, *program, "2", "0"), (2, *program, "2", "1")
    one, *two = [json.loads(each.splitlines()[-1]) for each in printed_together(*runs)]
    assert two == [one, one]
    assert len(set(one)) == len(sharded.TOGETHER)
