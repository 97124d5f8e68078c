"""Layer-wise decay gives every parameter of real models what the systems it comes from give it.

`golden/layer_decay.json` holds their numbers, for all parameters of a ViT, of BEiT and of ELECTRA:
those of timm as timm works them out, the others by the formulas of the published code. The script
beside it writes it anew and names the sources.
"""

import functools
import json
import math
import pathlib

import numpy as np
import pytest

import lrmult as lm
from lrmult import recipes
from tests.trees import tree_of

GOLDEN = pathlib.Path(__file__).parent / "golden" / "layer_decay.json"


@functools.cache
def systems():
    return {
        (system["system"], system["model"]): system
        for system in json.loads(GOLDEN.read_text())["systems"]
    }


def rows_of(system):
    """Path and shape in Flax, and depth, of each parameter."""
    for _, _, path, shape, depth in system["parameters"]:
        if "#" in path:
            for number, each in enumerate(depth):
                yield path.replace("#", str(number)), tuple(shape), each
        else:
            yield path, tuple(shape), depth


# How a user lists the depths, from these systems' descriptions ------------------------------------


def timm_vit(params, **how):
    """The final norm goes with the last block."""
    stem = ["cls_token", "pos_embed", "patch_embed"]
    depths = recipes.depths(params, "blocks", below=[stem], above=["head"], **how)
    depths[-2].append("norm")
    return depths


def timm_beit(params, **how):
    """The norm after the mean over patches is named `fc_norm`, and goes with the head."""
    stem, top = ["cls_token", "patch_embed"], ["fc_norm", "head"]
    return recipes.depths(params, "blocks", below=[stem], above=[top], **how)


def timm_beit_variant(params, **how):
    """All positions are part of the stem."""
    stem = ["cls_token", "pos_embed", "patch_embed", "rel_pos_bias"]
    depths = recipes.depths(params, "blocks", below=[stem], above=["head"], **how)
    depths[-2].append("norm")
    return depths


def beit_variant(params):
    """What is neither a token, nor a patch, nor a block goes with the head."""
    stem = ["cls_token", "pos_embed", "patch_embed"]
    return recipes.depths(params, "blocks", below=[stem], above=[["rel_pos_bias", "norm", "head"]])


def electra(params):
    """Between the last layer and the task's head, a depth is left out."""
    stem = ["electra/embeddings", "electra/embeddings_project"]
    return recipes.depths(
        params, "electra/encoder/layer", below=[stem], above=[[], "task_specific"]
    )


VARIANT = (
    "beit_base_patch16_224 with a class token's norm, absolute positions, shared relative positions"
)
DEPTHS = {
    ("timm", "vit_base_patch16_224"): timm_vit,
    ("timm", "beit_base_patch16_224"): timm_beit,
    ("timm", VARIANT): timm_beit_variant,
    ("BEiT", VARIANT): beit_variant,
    ("ELECTRA", "ELECTRA-Small with a classifier of two classes"): electra,
}
CASES = [
    pytest.param(key, decay, id=f"{by_user.__name__}-{decay}")
    for key, by_user in DEPTHS.items()
    for decay in systems()[key]["scales"]
]


def test_the_file_is_whole():
    assert systems().keys() == DEPTHS.keys()
    for system in systems().values():
        shapes = {path: shape for path, shape, _ in rows_of(system)}
        assert len(shapes) == len(list(rows_of(system)))
        assert sum(map(math.prod, shapes.values())) == system["size"]
    assert systems()["timm", "vit_base_patch16_224"]["size"] == 86_567_656  # published


@pytest.mark.parametrize(("key", "decay"), CASES)
def test_every_parameter(key, decay):
    system = systems()[key]
    params = tree_of({path: shape for path, shape, _ in rows_of(system)})
    rules = recipes.layer_decay(params, float(decay), DEPTHS[key](params))
    plan = lm.compile_rules(rules, params)
    found = {leaf.path: leaf.multiplier for leaf in plan.leaves}
    wanted = {path: system["scales"][decay][depth] for path, _, depth in rows_of(system)}
    assert found.keys() == wanted.keys()
    for path, multiplier in found.items():
        assert isinstance(multiplier, float), path
        assert multiplier == pytest.approx(wanted[path], rel=1e-12, abs=0), path


def stacked(system):
    """All blocks in one array, as `nn.scan` leaves them: the tree, and depths by path and block."""
    shapes, depths = {}, {}
    for path, shape, depth in rows_of(system):
        first, _, rest = path.partition("/")
        if first.startswith("blocks_"):
            path, shape = f"blocks/{rest}", (12, *shape)
        shapes[path] = shape
        depths.setdefault(path, []).append(depth)
    return tree_of(shapes), depths


@pytest.mark.parametrize("how", ["axis", "structure"])
@pytest.mark.parametrize(("key", "decay"), [c for c in CASES if c.values[0][0] == "timm"])
def test_every_layer_of_a_stack(key, decay, how):
    system = systems()[key]
    params, depths = stacked(system)
    structure = lm.Structure(stacked={"blocks": 0}) if how == "structure" else None
    listed = DEPTHS[key](params, **({"axis": 0} if how == "axis" else {"structure": structure}))
    rules = recipes.layer_decay(params, float(decay), listed, structure=structure)
    plan = lm.compile_rules(rules, params, structure=structure)
    assert {leaf.path for leaf in plan.leaves} == depths.keys()
    for leaf in plan.leaves:
        wanted = [system["scales"][decay][depth] for depth in depths[leaf.path]]
        found = np.asarray(leaf.multiplier)
        if leaf.path.startswith("blocks/"):
            assert found.shape == (12, *[1] * (len(leaf.shape) - 1)), leaf.path
        np.testing.assert_allclose(found.ravel(), wanted, rtol=1e-12, atol=0, err_msg=leaf.path)


def test_where_timm_and_beit_differ():
    """On one model: in the final norm, and in the relative positions that all blocks share."""
    params = tree_of({path: shape for path, shape, _ in rows_of(systems()["BEiT", VARIANT])})

    def multipliers(depths):
        plan = lm.compile_rules(recipes.layer_decay(params, 0.5, depths), params)
        return {leaf.path: leaf.multiplier for leaf in plan.leaves}

    timm, beit = multipliers(timm_beit_variant(params)), multipliers(beit_variant(params))
    assert {path: (timm[path], beit[path]) for path in timm if timm[path] != beit[path]} == {
        "norm/bias": (0.5, 1),
        "norm/scale": (0.5, 1),
        "rel_pos_bias/relative_position_bias_table": (0.5**13, 1),
    }


def test_a_parameter_that_no_depth_names_is_an_error():
    """timm and BEiT give it the full rate, in silence."""
    params = tree_of({path: shape for path, shape, _ in rows_of(systems()["BEiT", VARIANT])})
    depths = recipes.depths(params, "blocks", below=[["cls_token", "patch_embed"]], above=["head"])
    with pytest.raises(lm.RuleError, match=r"norm/bias.*norm/scale.*pos_embed.*rel_pos_bias"):
        recipes.layer_decay(params, 0.75, depths)
