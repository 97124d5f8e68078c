"""Write `layer_decay.json` anew: what systems with layer-wise learning rates give each parameter.

Not a test: run it by hand, where torch and timm are installed. The file there was made with timm
1.0.31 and torch 2.13.0 (the build for CPUs is enough, and torchvision is not needed). The numbers
of timm are those of its own `param_groups_layer_decay`; those of BEiT and ELECTRA, whose code asks
for versions of its time, are worked out here as that code does, with the names that it uses.
"""

import importlib.machinery
import importlib.util
import json
import math
import pathlib
import re
import sys
import types

ABOUT = [
    "What systems with layer-wise learning rates give each parameter. golden/layer_decay.py wrote",
    "it. A row of parameters: name and shape there, path and shape in Flax, depth. In place of '#'",
    "goes the number of a layer, from 0, and depth is a list with one entry for each. A list of",
    "scales has for each depth, under one decay, the factor on the learning rate; null where there",
    "is no parameter.",
]


# timm -------------------------------------------------------------------------------------------


class _Stub(type):
    """A class whose every attribute is another one."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Stub(name, (), {})


class _StubModule(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Stub(name, (), {})


class _WithoutTorchvision:
    """Imports torchvision where there is none: what others take from it is not used here."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StubModule(spec.name)

    def exec_module(self, module):
        pass


def do_without_torchvision():
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_WithoutTorchvision())


def timm_shapes(name, **options):
    """A model of timm, without memory for its arrays, and their shapes."""
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **options)
    return model, {name: tuple(leaf.shape) for name, leaf in model.named_parameters()}


def timm_system(name, decays, about, **options):
    import timm
    import torch
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay

    model, shapes = timm_shapes(name, **options)
    depths = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    scales = {}
    for decay in decays:
        groups = param_groups_layer_decay(model, layer_decay=decay)
        given = {id(leaf): group["lr_scale"] for group in groups for leaf in group["params"]}
        each = {name: given[id(leaf)] for name, leaf in model.named_parameters()}
        scales[decay] = by_depth(depths, each)
    return {
        "system": "timm",
        "model": about,
        "source": "timm.optim.param_groups_layer_decay (timm/optim/_param_groups.py), with depths "
        "by group_matcher of the model and group_parameters (timm/models/_manipulate.py)",
        "version": f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}",
        "scales": scales,
        "parameters": folded(shapes, depths, flax_of_torch),
    }


def flax_of_torch(name, shape):
    """`blocks.3.norm1.weight` and its shape, as a module of Flax would have them."""
    *above, last = re.sub(r"\bblocks\.(\d+)", r"blocks_\1", name).split(".")
    if last == "weight":
        last = "scale" if len(shape) == 1 else "kernel"
        shape = (*shape[2:], *shape[1::-1]) if len(shape) > 1 else shape
    return "/".join([*above, last]), shape


# BEiT -------------------------------------------------------------------------------------------

VARIANT = {"global_pool": "token", "use_abs_pos_emb": True, "use_shared_rel_pos_bias": True}
VARIANT_NAME = (
    "beit_base_patch16_224 with a class token's norm, absolute positions, shared relative positions"
)


def beit_system(decays):
    """What BEiT's own code gives a model whose arrays have the same names in timm.

    In `get_num_layer_for_vit` of beit/optim_factory.py the tokens, positions and patches have depth
    0, block i has i + 1, and all else, biases of relative positions and any norm and head, has the
    last depth, blocks + 1. In beit/run_class_finetuning.py the factor of depth i is
    layer_decay ** (blocks + 1 - i), and is used if layer_decay is below 1.
    """
    _, shapes = timm_shapes("beit_base_patch16_224", **VARIANT)
    blocks, depths = 12, {}
    for name in shapes:
        if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
            depths[name] = 0
        elif name.startswith("blocks"):
            depths[name] = int(name.split(".")[1]) + 1
        else:
            depths[name] = blocks + 1
    return {
        "system": "BEiT",
        "model": VARIANT_NAME,
        "source": "github.com/microsoft/unilm: get_num_layer_for_vit of beit/optim_factory.py and "
        "LayerDecayValueAssigner as beit/run_class_finetuning.py makes it",
        "version": "commit 2312c6fb384689d4ffdbc65360bcce7148cfbeed",
        "scales": {
            decay: [decay ** (blocks + 1 - i) for i in range(blocks + 2)] for decay in decays
        },
        "parameters": folded(shapes, depths, flax_of_torch),
    }


# ELECTRA ----------------------------------------------------------------------------------------


def electra_shapes(layers=12, width=256, hidden=1024, embedding=128):
    """ELECTRA-Small on SST-2: the variables of model/modeling.py and of its classification head."""
    shapes = {}

    def dense(name, inputs, outputs):
        shapes[f"{name}/kernel"], shapes[f"{name}/bias"] = (inputs, outputs), (outputs,)

    def norm(name, size):
        shapes[f"{name}/LayerNorm/beta"] = shapes[f"{name}/LayerNorm/gamma"] = (size,)

    for name, rows in {"word": 30522, "token_type": 2, "position": 512}.items():
        shapes[f"electra/embeddings/{name}_embeddings"] = (rows, embedding)
    norm("electra/embeddings", embedding)
    dense("electra/embeddings_project", embedding, width)
    for i in range(layers):
        layer = f"electra/encoder/layer_{i}"
        for name in ("query", "key", "value"):
            dense(f"{layer}/attention/self/{name}", width, width)
        dense(f"{layer}/attention/output/dense", width, width)
        norm(f"{layer}/attention/output", width)
        dense(f"{layer}/intermediate/dense", width, hidden)
        dense(f"{layer}/output/dense", hidden, width)
        norm(f"{layer}/output", width)
    dense("task_specific/sst/dense", width, 2)
    return shapes


def electra_system(decays):
    """What ELECTRA's own code gives.

    `_get_layer_lrs` of model/optimization.py multiplies the learning rate by
    layer_decay ** (layers + 2 - depth): depth 0 for what is in /embeddings/ and
    /embeddings_project/, i + 1 in encoder/layer_<i>/, layers + 2 in task_specific/. A variable that
    is in none of them is an error. The default decay of configure_finetuning.py is 0.8, and for the
    large model 0.9.
    """
    shapes, layers, depths = electra_shapes(), 12, {}
    for name in shapes:
        if "/embeddings/" in name or "/embeddings_project/" in name:
            depths[name] = 0
        elif "task_specific/" in name:
            depths[name] = layers + 2
        else:
            depths[name] = int(re.search(r"encoder/layer_(\d+)/", name)[1]) + 1
    scales = {}
    for decay in decays:
        scales[decay] = [decay ** (layers + 2 - depth) for depth in range(layers + 3)]
        scales[decay][layers + 1] = None
    return {
        "system": "ELECTRA",
        "model": "ELECTRA-Small with a classifier of two classes",
        "source": "github.com/google-research/electra: _get_layer_lrs of model/optimization.py, "
        "and apply_gradients there, which looks for its keys in the names of variables",
        "version": "commit ac8d487dcfd98b690a828fc27d6841f270409b29",
        "scales": scales,
        "parameters": folded(shapes, depths, flax_of_tensorflow),
    }


def flax_of_tensorflow(name, shape):
    *above, last = name.split("/")
    if last.endswith("_embeddings"):
        last += "/embedding"
    return "/".join([*above, {"gamma": "scale", "beta": "bias"}.get(last, last)]), shape


# The file ---------------------------------------------------------------------------------------


def by_depth(depths, scales):
    """The one scale of each depth."""
    found = {}
    for name, scale in scales.items():
        if found.setdefault(depths[name], scale) != scale:
            raise ValueError(f"{name} has {scale}, another of its depth {found[depths[name]]}")
    return [found.get(depth) for depth in range(max(found) + 1)]


def folded(shapes, depths, flax):
    """A row for each parameter, and one for those that differ in the number of a layer alone."""
    rows = {}
    for name, shape in shapes.items():
        layered = re.sub(r"(blocks\.|layer_)\d+", r"\1#", name)
        path = re.sub(r"((?:blocks|layer)_)\d+", r"\1#", flax(name, shape)[0])
        row = rows.setdefault(layered, [layered, shape, path, flax(name, shape)[1], []])
        row[-1].append(depths[name])
        if row[1] != shape or layered.replace("#", str(len(row[-1]) - 1)) != name:
            raise ValueError(f"{name} does not fit into the row {row}")
    return [[*row, depth if "#" in row[0] else depth[0]] for *row, depth in rows.values()]


def text_of(systems):
    """JSON with a line for each row."""

    def lines(values, indent):
        return f",\n{indent}".join(json.dumps(value) for value in values)

    texts = []
    for system in systems:
        head = [f'"{key}": {json.dumps(system[key])}' for key in list(system)[:4]]
        size = sum(
            math.prod(row[1]) * (len(row[4]) if "#" in row[0] else 1)
            for row in system["parameters"]
        )
        scales = [f'"{decay}": {json.dumps(each)}' for decay, each in system["scales"].items()]
        body = [
            *head,
            f'"size": {size}',
            '"scales": {\n    ' + ",\n    ".join(scales) + "\n  }",
            '"parameters": [\n    ' + lines(system["parameters"], "    ") + "\n  ]",
        ]
        texts.append("{\n  " + ",\n  ".join(body) + "\n}")
    about = '"about": [\n' + lines(ABOUT, "") + "\n]"
    return "{\n" + about + ',\n"systems": [\n' + ",\n".join(texts) + "\n]\n}\n"


def main():
    do_without_torchvision()
    systems = [
        timm_system("vit_base_patch16_224", (0.75, 0.65), "vit_base_patch16_224"),
        timm_system("beit_base_patch16_224", (0.75, 0.65), "beit_base_patch16_224"),
        timm_system("beit_base_patch16_224", (0.75, 0.65), VARIANT_NAME, **VARIANT),
        beit_system((0.75, 0.65)),
        electra_system((0.8, 0.9)),
    ]
    pathlib.Path(__file__).with_suffix(".json").write_text(text_of(systems))


if __name__ == "__main__":
    main()
