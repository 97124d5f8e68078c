"""The examples run, and show what they promise."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import lrmult as lm

ROOT = pathlib.Path(__file__).parent.parent


def output_of(example, tmp_path, *options):
    """What an example prints, after a look at the picture that it draws."""
    picture = tmp_path / "picture.png"
    command = [sys.executable, ROOT / "examples" / example, "--output", picture, *options]
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000
    return done.stdout


@pytest.mark.slow
def test_transfer_learning(tmp_path):
    text = output_of("transfer_learning.py", tmp_path)
    assert "0: 'layers[9]'" in text  # the plan's table
    kept, of = re.search(r"(\d+) of (\d+) frozen arrays are identical", text).groups()
    assert kept == of == "60"
    assert "only layers/9/bias and layers/9/kernel changed" in text
    [digits] = re.findall(r"digits held out: ([0-9.]+)%", text)
    [untrained] = re.findall(r"untrained trunk ([0-9.]+)%", text)
    [trained] = re.findall(r" trained trunk ([0-9.]+)%", text)
    assert float(digits) > 95
    assert float(trained) > float(untrained) > 100 / 3


def test_freeze_neurons(tmp_path):
    text = output_of("freeze_neurons.py", tmp_path)
    assert "0: neurons('fc2', [0, 1, 2, 3, 4, 5])" in text  # the plan's table
    assert re.search(r"six frozen +6 of 32 units are identical, 26 changed", text)
    assert re.search(r"all of fc2 frozen +32 of 32", text)
    moved = {
        name: float(fc1)
        for name, fc1 in re.findall(
            r"^(\w[\w ]+?) +[0-9.]+ +[0-9.]+ +([0-9.]+)", text, re.MULTILINE
        )
    }
    assert moved["all of fc2 frozen"] > 10 * moved["weight decay alone"]  # all through frozen units


@pytest.mark.slow
def test_new_tokens(tmp_path):
    text = output_of("new_tokens.py", tmp_path)
    assert "0: rows('embed/embedding', slice(1000, None))" in text  # the plan's table
    assert "640 train, 116,160 frozen" in text
    assert "116,160 frozen numbers kept every bit; the other 640 changed" in text
    assert "losses without the new words kept every bit" in text
    before, after, _ = map(float, re.search(r"at the new words +(.+)", text)[1].split())
    assert after < before - 1


@pytest.mark.slow
def test_gradual_unfreezing(tmp_path):
    text = output_of("gradual_unfreezing.py", tmp_path)
    assert "8 arrays, 12,805 parameters: 4,485 train, 8,320 frozen" in text  # the plan's table
    assert "2,604, 35,884, 69,164, 102,444; all: 102,444" in text
    assert "what was frozen in a stage kept every bit; and so did" in " ".join(text.split())
    rises = {
        name: [float(x) for x in rise]
        for name, *rise in re.findall(
            r"^(\w+) +([-+][\d.]+)% +([-+][\d.]+)% +([-+][\d.]+)%", text, re.MULTILINE
        )
    }
    assert rises["migrate"][-1] < 0 < rises["restart"][-1]


@pytest.mark.slow
def test_recurrent(tmp_path):
    text = output_of("recurrent.py", tmp_path)
    flat = " ".join(text.split())
    assert "cell/l1/bias cell/l1/kernel cell/l2/bias cell/l2/kernel cell/l3/kernel Four" in flat
    assert flat.count("ShadowedRuleError: rule 1 ('cell/l3' -> frozen): it can never apply") == 2
    assert flat.count("('cell/l3/kernel'); put it before rule 0, or remove it") == 2
    assert "UnmatchedRuleError: rule 0 ('l3' -> frozen): no path matches 'l3'; did" in flat
    assert "did you mean 'cell/l3'?" in flat
    assert "PositionError: rule 0 (3 -> frozen): the only child at the root, 'cell'," in flat
    assert re.search(r"^cell/l3 .+ 4 +frozen +0: 'cell/l3'$", text, re.MULTILINE)  # the plan
    assert "Fixed: l3 kept every bit in 6 of 6 runs, and all else changed." in text
    assert "Trained: 'cell/l3/kernel' float32[2,2] is frozen, but changed at [0, 0]" in flat
    found = {
        name: ([float(x) for x in errors.split()], l3)
        for name, errors, l3 in re.findall(
            r"^(\w[\w ,]+?)((?: +\d\.\d{3}){4})(?: +(\[.+\]))?$", text, re.MULTILINE
        )
    }
    fixed, l3 = found["fixed"]
    assert l3 == found["fixed, in NNX"][1] == "[1.000, 0.500] [0.000, 1.000]" != found["trained"][1]
    assert max(abs(a - b) for a, b in zip(fixed, found["fixed, in NNX"][0], strict=True)) < 0.05
    assert fixed[0] < found["Kalman filter"][0][0]  # l1 and l2 have learned
    assert fixed[3] < found["trained"][0][3]  # of the velocity, which only l3 knows
    free, frozen, cut = (
        [float(x) for x in re.search(rf"^{name} +([\d. ]+)$", text, re.MULTILINE)[1].split()]
        for name in ("l3 like any layer", "l3 frozen, by lm.stop_frozen", "l3's output cut off")
    )
    assert min(free) > 0
    assert max(abs(a - b) for a, b in zip(frozen[:2], free[:2], strict=True)) < 0.02
    assert frozen[2] == 0
    assert cut == [0, 0, 0]


def test_sharded(tmp_path):
    text = output_of("sharded.py", tmp_path)
    assert re.search(r"Dense_2/kernel .+ 1: neurons\('Dense_2', slice\(None, 128\)\)", text)
    rows = {
        (name, int(devices)): [float(number) for number in numbers.split()]
        for name, devices, numbers in re.findall(
            r"^(AdamW|with rules) +([18])((?: +[\d.]+){5})%$", text, re.MULTILINE
        )
    }
    plain, ruled = rows["AdamW", 8], rows["with rules", 8]
    assert plain[0] < rows["AdamW", 1][0] / 7.5  # each device keeps its share
    assert plain[0] == ruled[0]
    assert ruled[1] < plain[1] / 4  # the moments
    assert plain[2] == ruled[2] > 0  # gathered
    assert 0 < ruled[3] < plain[3] / 2  # summed
    assert ruled[4] == rows["with rules", 1][4] > 80
    differences = re.findall(r"losses of one device and eight differ by (.+)$", text, re.MULTILINE)
    assert len(differences) == 2
    assert max(map(float, differences)) < 1e-4
    assert "115,328 frozen numbers, split among eight devices, kept every bit" in text


def test_fixed_kernels(tmp_path):
    text = output_of("fixed_kernels.py", tmp_path)
    assert re.search(r"^conv1 .+ 80 +frozen +0: 'conv1'$", text, re.MULTILINE)  # the plan's table
    assert "[-0.452  0.     0.452]" in text  # by lm.extract, what lm.replace put there
    frozen, free = map(
        float, re.search(r"step of training: ([\d.]+) .+, ([\d.]+) MFLOP", text).groups()
    )
    assert frozen < 0.8 * free
    assert "the same bytes after training as set by hand, in 5 of 5 runs." in text
    assert "what was frozen kept every bit, and all other arrays changed." in text
    rates = {
        name: (float(plain), [float(x) for x in rest.split("%")[:3]], float(total))
        for name, plain, rest, total in re.findall(
            r"^(\w+, \w+) +([\d.]+)% \(.+?\)((?: +[\d.]+%){3}) +([\d.]+)$", text, re.MULTILINE
        )
    }
    assert list(rates) == ["edges, frozen", "edges, trained", "random, frozen", "random, trained"]
    plain, brighter, total = rates.pop("edges, frozen")
    assert plain > 96
    assert max(abs(rate - plain) for rate in brighter) < 0.2
    assert total == 0
    for lower in rates.values():
        assert lower[0] > 95
        assert lower[1][2] < plain - 5
        assert lower[2] > 0.1


@pytest.mark.slow
def test_layer_decay_vit(tmp_path):
    checkpoint = tmp_path / "vit.npz"
    text = output_of("layer_decay_vit.py", tmp_path, "--runs", "2", "--checkpoint", str(checkpoint))
    decayed = re.findall(r"^block_(\d) .+ 8,544 +([\d.]+) +\d+: 'block_\1'$", text, re.MULTILINE)
    assert [float(multiplier) for _, multiplier in decayed] == [0.75 ** (6 - k) for k in range(6)]
    assert "All 104 multipliers are 0.75 to the power of the layers above." in text
    rates = {
        name: [float(rate) for rate in re.findall(r"([\d.]+)% \(", cells)]
        for name, cells in re.findall(
            r"^(\w[\w ]+?) +((?:[\d.]+% \(.+?\) *){4})$", text, re.MULTILINE
        )
    }
    assert list(rates) == ["layer decay", "one rate", "linear probe", "from random numbers"]
    assert min(max(found) for found in rates.values()) > 40  # a fifth is chance
    quotients = [float(x) for x in re.findall(r"^\d: .+ ([\d.]+)$", text, re.MULTILINE)]
    assert len(quotients) == 8
    assert quotients == sorted(quotients, reverse=True)  # the lower a layer, the less it moves

    [table] = re.findall(r"The plan of rules.toml:\n\n(.+)\n\nThe same", text, re.DOTALL)
    claiming = {int(rule) for rule in re.findall(r"(?<= |;)(\d+): (?=['{\w.])", table)}
    assert claiming == {*range(17)} - {8}
    assert "rule 8 ('registers' -> 5) claims nothing here" in table
    command = [sys.executable, "-m", "lrmult", "explain", checkpoint]
    command += ["--rules", ROOT / "examples" / "rules.toml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(table)


@pytest.mark.slow
def test_lora_plus(tmp_path):
    text = output_of("lora_plus.py", tmp_path, "--runs", "2")
    assert "6,440 train, 150,794 frozen" in text  # the plan's table
    for name, multiplier in (("a", 1), ("b", 16)):
        assert re.search(rf"^\S+/lora_{name} .+ {multiplier} +\d: \S+$", text, re.MULTILINE)
    state = 2 * 4 * 6440 + 8  # two moments of what trains; Adam and its schedule count
    assert f"The state of Adam: 1,257,876 bytes; in lm.wrap: {state:,}" in text
    flat = " ".join(text.split())
    assert "The base kept every bit, and all adapters changed." in flat
    assert "3,590 logits for 359 upright digits are what they were, bit by bit." in flat
    by_recipe, at_run_time = (
        float(re.search(rf"{name}: +([\d.]+)$", text, re.MULTILINE)[1])
        for name in ("nnx.Optimizer", "run time")
    )
    assert abs(by_recipe - at_run_time) < 0.05
    found = re.findall(r"^ +(\d+)   2\^-.+\) +([\d.]+)% \(", text, re.MULTILINE)
    assert [int(ratio) for ratio, _ in found] == [1, 4, 16, 64]
    assert min(float(rate) for _, rate in found) > 80
    assert float(re.search(r"upright, ([\d.]+)% sideways", text)[1]) < 40  # before


@pytest.mark.slow
def test_precompute(tmp_path):
    text = output_of("precompute.py", tmp_path, "--epochs", "8")
    assert re.search(r"^trunk .+ 104,880 +frozen +0: 'trunk'$", text, re.MULTILINE)  # the plan
    assert re.search(r"^.*Net/trunk/norm +float32\[64,48\] +192$", text, re.MULTILINE)  # the cut
    assert "The linear probe needs the same features" in text
    examples, numbers, label = 704, 48, 4
    sizes = [f"{examples * (numbers * size + label):,}" for size in (4, 2)]
    assert f"float32, in memory      {sizes[0]} bytes" in text
    assert "bfloat16, in files      320 of 704 images, then a stop" in text
    assert f"the same once more      {sizes[1]} bytes, as if there had been no stop" in text
    found = re.findall(
        r"^  (images|features|features in bfloat16) +(\d[\d.% e-]+)$", text, re.MULTILINE
    )
    cells = [[float(x.strip("%")) for x in line.split()] for _, line in found]
    ways = [way for way, _ in found]
    assert ways == 2 * ["images", "features", "features in bfloat16"]
    for images, wide, narrow in (cells[:3], cells[3:]):
        assert max(wide[0], narrow[0]) < 0.01 * images[0]  # FLOPs
        assert min(wide[2], narrow[2]) > 2  # times as fast
        assert images[2] > 75  # accuracy; a fifth is chance
        assert abs(wide[3] - images[2]) < 1
        assert max(wide[4:]) < 1e-5  # differences of losses and weights
        assert 0 < narrow[4] < 0.1
    assert "In all 6 runs the trunk kept every bit." in text
    assert "FeaturesError: the features are out of date: 'trunk/Conv_0/bias' changed" in text


def test_the_file_of_rules_fits_its_model():
    path = ROOT / "examples" / "layer_decay_vit.py"
    spec = importlib.util.spec_from_file_location("layer_decay_vit", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    images = jax.ShapeDtypeStruct((1, 8, 8), "float32")
    params = jax.eval_shape(example.ViT(5, 1).init, jax.random.key(0), images)["params"]
    plan = lm.compile_rules(lm.load_rules(ROOT / "examples" / "rules.toml", params), params)
    claiming = {claim.index for leaf in plan.leaves for claim in leaf.rules}
    assert claiming == {*range(17)} - {8}  # one is for models of another kind
