"""Write `mup.json` and `recipes.json` anew: learning rates by the systems that recipes come from.

Not a test: run it by hand, where these are installed. The files there were made with mup 1.0.0,
fastai 2.8.12 (fastcore 2.2.39), peft 0.21.2 and torch 2.13.0, each by its own code.
"""

import importlib.metadata
import json
import pathlib

HERE = pathlib.Path(__file__).parent


def versions(*names):
    return ", ".join(f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in names)


# muP --------------------------------------------------------------------------------------------

# In mup/infshape.py an axis is a width where its size in the base model differs from that in the
# "delta" model, and r is its size over that in the base; shapes are (outputs, inputs). In
# mup/optim.py MuAdam divides the learning rate of what has two widths by r of the inputs; MuSGD
# multiplies that of what has one by its r, and divides that of what has two by r of the inputs over
# r of the outputs. Both scale weight decay the other way round. Output layers are MuReadout
# (mup/layer.py), which divides what comes in by r.
#
# That is table 8 of "Tensor Programs V" (Yang et al. 2022, arXiv:2203.03466), as its authors say in
# issue 7 of github.com/microsoft/mup. Without the division in the output layer it is table 3: with
# fan_in the inputs, Adam and SGD take 1 / fan_in for output weights, and the others as in table 8
# (input weights and biases: fan_out with SGD, 1 with Adam; hidden weights: 1 and 1 / fan_in).

MUP_ABOUT = [
    "Multipliers of learning rate and weight decay in muP. golden/recipes.py wrote it. A row: name",
    "in PyTorch, path in Flax, shape in Flax in the base model and in the wide one; multipliers of",
    "the learning rate by MuAdam and MuSGD (output divided by r, table 8); those of weight decay",
    "by both; those of the learning rate for Adam and SGD by table 3 of arXiv:2203.03466 (output",
    "not divided), or null where widths do not all grow alike.",
]


def plain_mlp(width, _):
    """With a table of 100 embeddings. The 64 inputs are no width, though the base is 64 wide."""
    import mup
    from torch import nn

    return nn.ModuleDict(
        {
            "embed": nn.Embedding(100, width),
            "input": nn.Linear(64, width),
            "hidden": nn.Linear(width, width),
            "output": mup.MuReadout(width, 10),
        }
    )


def uneven_mlp(wide, narrow):
    """Two widths, which need not grow alike, with what else a network has."""
    import mup
    from torch import nn

    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, wide, 5),
            "conv_hidden": nn.Conv2d(wide, narrow, 3),
            "norm": nn.LayerNorm(narrow),
            "up": nn.Linear(narrow, wide),
            "down": nn.Linear(wide, narrow, bias=False),
            "output": mup.MuReadout(narrow, 10, bias=False),
        }
    )


def mup_example(name, make, base, delta, wide):
    import mup
    import torch

    models = [make(*widths) for widths in (base, wide, delta)]
    mup.set_base_shapes(models[1], models[0], delta=models[2])
    found = {}
    for optimizer in (mup.MuAdam, mup.MuSGD):
        # With AdamW, as MuAdamW has it: the groups are the same.
        impl = {"impl": torch.optim.AdamW} if optimizer is mup.MuAdam else {}
        made = optimizer(models[1].parameters(), lr=1.0, weight_decay=1.0, **impl)
        for group in made.param_groups:
            for leaf in group["params"]:
                found.setdefault(id(leaf), []).append((group["lr"], group["weight_decay"]))
    ratios = {new / old for new, old in zip(wide, base, strict=True)}
    rows = []
    shapes = {each: leaf.shape for each, leaf in models[0].named_parameters()}
    for each, leaf in models[1].named_parameters():
        (adam, adam_decay), (sgd, sgd_decay) = found[id(leaf)]
        table_3 = [adam, sgd]
        if each == "output.weight":
            table_3 = [1 / ratio for ratio in ratios] * 2
        if len(ratios) > 1:
            table_3 = [None, None]
        path, old = flax(each, shapes[each])
        rows.append(
            [each, path, old, flax(each, leaf.shape)[1], adam, sgd, adam_decay, sgd_decay, *table_3]
        )
    return {"model": name, "parameters": rows}


def flax(name, shape):
    """Path and shape of a parameter in Flax."""
    layer, kind = name.split(".")
    if layer == "embed":
        return f"{layer}/embedding", tuple(shape)
    if kind == "weight":
        kind = "scale" if len(shape) == 1 else "kernel"
    if kind == "kernel":
        shape = (*shape[2:], *shape[1::-1])
    return f"{layer}/{kind}", tuple(shape)


def mup_text():
    examples = [
        mup_example(
            "64 inputs, two layers of width 256, 10 outputs; the base is 64 wide",
            plain_mlp, (64, 64), (128, 128), (256, 256),
        ),
        mup_example(
            "widths 256 and 64; in the base 64 and 32",
            uneven_mlp, (64, 32), (128, 48), (256, 64),
        ),
    ]  # fmt: skip
    source = "github.com/microsoft/mup: MuAdam and MuSGD of mup/optim.py, mup/infshape.py"
    head = {"about": MUP_ABOUT, "source": source, "version": versions("mup", "torch")}
    return text_of(head, "examples", examples, "parameters")


# fastai and LoRA+ -------------------------------------------------------------------------------

RECIPES_ABOUT = [
    "Learning rates that fastai and LoRA+ give. golden/recipes.py wrote it. A row of fastai has lo",
    "(or null), hi, and the rate of each group; one of LoRA+ the name in PEFT, path and shape in",
    "Flax, and the rate, or null where it is frozen.",
]


def fastai_rates():
    """`slice(lo, hi)` and `slice(hi)` as rates of parameter groups.

    `set_hyper` of fastai/optimizer.py takes `even_mults(lo, hi, groups)` of fastcore: the k-th of n
    gets lo * ((hi / lo) ** (1 / (n - 1))) ** k, and a single one hi. Without lo all but the last
    group get hi / 10.
    """
    from layer_decay import do_without_torchvision

    do_without_torchvision()
    import torch
    from fastai.optimizer import SGD

    cases = [(1e-6, 1e-4, 3), (1e-5, 1e-2, 4), (1e-3, 1e-3, 2), (0.02, 0.5, 7), (1e-4, 1e-2, 1)]
    rows = []
    for lo, hi, count in [*cases, (None, 3e-3, 3), (None, 1.0, 2), (None, 1.0, 1)]:
        groups = [[torch.nn.Parameter(torch.zeros(1))] for _ in range(count)]
        optimizer = SGD(groups, lr=1.0)
        optimizer.set_hyper("lr", slice(lo, hi))
        rows.append([lo, hi, [hyper["lr"] for hyper in optimizer.hypers]])
    return {
        "system": "fastai",
        "source": "github.com/fastai/fastai: set_hyper of fastai/optimizer.py; even_mults of "
        "github.com/fastai/fastcore, fastcore/basics.py",
        "version": versions("fastai", "fastcore"),
        "rows": rows,
    }


def lora_plus_rates(rate=1e-3, ratio=16.0):
    """Rates of a small model with adapters, and with a norm and a head that train in full.

    `create_loraplus_optimizer`, in lora_plus.py of the authors and in PEFT alike: what belongs to
    an adapter of an embedding gets a rate of its own (1e-6 by default, whatever the others have);
    else lora_B, and all that has one axis, gets rate * ratio; all else that trains gets the rate.
    """
    import peft
    import torch
    from peft.optimizers import create_loraplus_optimizer
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.query = nn.Linear(8, 6)
            self.norm = nn.LayerNorm(6)
            self.classifier = nn.Linear(6, 3)

    config = peft.LoraConfig(
        r=2, target_modules=["embed", "query"], modules_to_save=["norm", "classifier"]
    )
    model = peft.get_peft_model(Model(), config)
    made = create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio)
    rates = {id(leaf): group["lr"] for group in made.param_groups for leaf in group["params"]}
    rows = []
    for name, leaf in model.named_parameters():
        if "original_module" not in name:  # what modules_to_save stand in for
            rows.append([name, *flax_of_peft(name, leaf.shape), rates.get(id(leaf))])
    return {
        "system": "LoRA+",
        "source": "github.com/huggingface/peft: create_loraplus_optimizer of "
        "src/peft/optimizers/loraplus.py; the same groups in lora_plus.py of "
        "github.com/nikhil-ghosh-berkeley/loraplus",
        "version": versions("peft", "torch"),
        "rate": rate,
        "ratio": ratio,
        "rows": rows,
    }


def flax_of_peft(name, shape):
    """`query.lora_A.default.weight` and its shape as `query/lora_a`, as in Flax NNX."""
    layer, kind, *rest = name.removeprefix("base_model.model.").split(".")
    if kind.startswith("lora_"):
        return f"{layer}/{kind.replace('embedding_', '').lower()}", tuple(shape)[::-1]
    return flax(f"{layer}.{rest[-1]}", shape)


def recipes_text():
    systems = [fastai_rates(), lora_plus_rates()]
    return text_of({"about": RECIPES_ABOUT}, "systems", systems, "rows")


def text_of(head, key, examples, table):
    """JSON with a line for each row of a table."""

    def pairs(values, indent):
        for name, value in values.items():
            text = json.dumps(value)
            if isinstance(value, list):
                text = f"[\n{indent}  " + f",\n{indent}  ".join(map(json.dumps, value))
                text += f"\n{indent}]"
            yield f'{indent}"{name}": {text}'

    bodies = [",\n".join(pairs(example, "      ")) for example in examples]
    listed = ",\n".join(f"    {{\n{body}\n    }}" for body in bodies)
    return "{\n" + ",\n".join([*pairs(head, "  "), f'  "{key}": [\n{listed}\n  ]']) + "\n}\n"


if __name__ == "__main__":
    (HERE / "mup.json").write_text(mup_text())
    (HERE / "recipes.json").write_text(recipes_text())
