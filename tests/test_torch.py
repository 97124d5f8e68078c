"""Training under rules ends where PyTorch ends with a learning rate for each parameter group.

A small convolutional network learns scikit-learn's digits for 50 steps in float64, from the same
weights and on the same batches: in PyTorch with groups in `torch.optim.AdamW` or `SGD`, one layer
frozen by `requires_grad_(False)`, and here with the same optimizers of optax under rules.
`golden/torch.json` holds what PyTorch (2.13.0) came to; `python tests/test_torch.py` writes it
anew, where torch is installed. Where it is, it also trains beside the test.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lrmult as lm
from tests.versions import enable_x64

GOLDEN = pathlib.Path(__file__).parent / "golden" / "torch.json"
STEPS, BATCH = 50, 32
RATE = {"adamw": 0.02, "sgd": 0.2}
DECAY = {"adamw": 0.05, "sgd": 0.002}
MOMENTUM = 0.9
RATIOS = {"conv_1": 0.1, "hidden": 0.5, "head": 3.0}  # on the learning rate; conv_0 is frozen
RULES = [("params/conv_0", None), *((f"params/{name}", r) for name, r in RATIOS.items())]
SHAPES = {
    "conv_0": (3, 3, 1, 4),
    "conv_1": (3, 3, 4, 8),
    "hidden": (2 * 2 * 8, 16),
    "head": (16, 10),
}


def first_weights():
    """Those of both, as Flax has them. (`RandomState` draws the same in all versions of NumPy.)"""
    rng = np.random.RandomState(0)
    weights = {}
    for name, shape in SHAPES.items():
        scale = (3 / np.prod(shape[:-1])) ** 0.5
        weights[f"{name}/kernel"] = rng.uniform(-1, 1, shape) * scale
        weights[f"{name}/bias"] = rng.uniform(-1, 1, shape[-1:]) * scale
    return weights


@functools.cache
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images[: STEPS * BATCH].reshape(STEPS, BATCH, 8, 8, 1) / 16
    return images, labels[: STEPS * BATCH].reshape(STEPS, BATCH)


# PyTorch ----------------------------------------------------------------------------------------


def train_with_torch(optimizer):
    """The weights, as Flax has them, and the losses."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_0 = torch.nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.conv_1 = torch.nn.Conv2d(4, 8, 3, stride=2, padding=1)
            self.hidden = torch.nn.Linear(32, 16)
            self.head = torch.nn.Linear(16, 10)

        def forward(self, images):
            x = torch.tanh(self.conv_1(torch.tanh(self.conv_0(images))))
            x = x.permute(0, 2, 3, 1).flatten(1)  # in the order of Flax
            return self.head(torch.tanh(self.hidden(x)))

    torch.set_num_threads(1)  # more of them wait for each other
    net = Net().double()
    with torch.no_grad():
        for path, array in first_weights().items():
            name, kind = path.split("/")
            leaf = getattr(getattr(net, name), "bias" if kind == "bias" else "weight")
            leaf.copy_(torch.tensor(array.transpose(TO_TORCH[array.ndim])))
    net.conv_0.requires_grad_(False)
    groups = [
        {"params": getattr(net, name).parameters(), "lr": RATE[optimizer] * ratio}
        for name, ratio in RATIOS.items()
    ]
    if optimizer == "adamw":
        opt = torch.optim.AdamW(groups, weight_decay=DECAY[optimizer])
    else:
        opt = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=DECAY[optimizer])
    losses = []
    for images, labels in zip(*map(torch.tensor, digits()), strict=True):
        loss = torch.nn.functional.cross_entropy(net(images.permute(0, 3, 1, 2)), labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    weights = {}
    for name in SHAPES:
        layer = getattr(net, name)
        kernel = layer.weight.detach().numpy()
        weights[f"{name}/kernel"] = kernel.transpose(FROM_TORCH[kernel.ndim])
        weights[f"{name}/bias"] = layer.bias.detach().numpy()
    return weights, np.array(losses)


TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}


@functools.cache
def golden(optimizer):
    kept = json.loads(GOLDEN.read_text())[optimizer]
    weights = {path: np.array(array) for path, array in kept["weights"].items()}
    return weights, np.array(kept["losses"])


# optax ------------------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = images
        for i, features in enumerate((4, 8)):
            conv = nn.Conv(features, (3, 3), 2, ((1, 1), (1, 1)), name=f"conv_{i}")
            x = nn.tanh(conv(x))
        x = nn.tanh(nn.Dense(16, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="head")(x)


def optimizer_of(optimizer):
    if optimizer == "adamw":
        return optax.adamw(RATE[optimizer], weight_decay=DECAY[optimizer])
    # PyTorch's SGD adds the decay to the gradient, in front of the momentum.
    return optax.chain(
        optax.add_decayed_weights(DECAY[optimizer]), optax.sgd(RATE[optimizer], momentum=MOMENTUM)
    )


def train_with_optax(*transforms):
    """The weights and losses under each of some transformations."""
    params = {}
    for path, array in first_weights().items():
        name, kind = path.split("/")
        params.setdefault(name, {})[kind] = jnp.asarray(array)
    params = {"params": params}

    def loss_of(params, images, labels):
        logits = Net().apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    # All in one, and hardly optimized: what takes long is to compile.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def train(params, batches):
        def step(carry, batch):
            after, losses = [], []
            for tx, (params, state) in zip(transforms, carry, strict=True):
                loss, grads = jax.value_and_grad(loss_of)(params, *batch)
                updates, state = tx.update(grads, state, params)
                after.append((optax.apply_updates(params, updates), state))
                losses.append(loss)
            return after, losses

        return jax.lax.scan(step, [(params, tx.init(params)) for tx in transforms], batches)

    after, losses = train(params, tuple(map(jnp.asarray, digits())))
    return [
        (
            {
                f"{name}/{kind}": np.asarray(array)
                for name, layer in params["params"].items()
                for kind, array in layer.items()
            },
            np.asarray(trace),
        )
        for (params, _), trace in zip(after, losses, strict=True)
    ]


def check_same(found, wanted, tolerance):
    (weights, losses), (wanted_weights, wanted_losses) = found, wanted
    assert weights.keys() == wanted_weights.keys()
    for path, array in weights.items():
        np.testing.assert_allclose(array, wanted_weights[path], tolerance, tolerance, err_msg=path)
    np.testing.assert_allclose(losses, wanted_losses, tolerance, tolerance)


@pytest.mark.parametrize("optimizer", RATE)
def test_the_weights_are_those_of_torch(optimizer):
    with enable_x64(True):
        chained, wrapped = train_with_optax(
            optax.chain(optimizer_of(optimizer), lm.scale_by_rules(RULES)),
            lm.wrap(optimizer_of(optimizer), RULES),
        )
    start = first_weights()
    for weights, losses in (chained, wrapped):
        assert {array.dtype for array in weights.values()} == {np.dtype("float64")}
        check_same((weights, losses), golden(optimizer), 1e-9)
        assert losses.min() < losses[0] / 2
        for path, array in weights.items():
            if path.startswith("conv_0/"):
                assert array.tobytes() == start[path].tobytes()
            else:
                assert np.abs(array - start[path]).max() > 0.01, path


def test_in_float32_too():
    chained = optax.chain(optimizer_of("adamw"), lm.scale_by_rules(RULES))
    [found] = train_with_optax(chained)
    check_same(found, golden("adamw"), 1e-4)


def test_without_the_rules_they_are_others():
    [(weights, _)] = train_with_optax(optimizer_of("sgd"))
    for path, array in golden("sgd")[0].items():
        assert np.abs(array - weights[path]).max() > 0.01, path


@pytest.mark.parametrize("optimizer", RATE)
def test_torch_itself_trains_to_these_weights(optimizer):
    pytest.importorskip("torch", reason="the weights in golden/torch.json stand for it")
    check_same(train_with_torch(optimizer), golden(optimizer), 1e-9)


if __name__ == "__main__":
    lines = []
    for each in RATE:
        arrays, trace = train_with_torch(each)
        rows = [f'"{path}": {json.dumps(array.tolist())}' for path, array in arrays.items()]
        lines.append(
            f'"{each}": {{\n"losses": {json.dumps(trace.tolist())},\n"weights": {{\n'
            + ",\n".join(rows)
            + "\n}\n}"
        )
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
