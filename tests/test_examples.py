"""The examples run, and show what they promise."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def output_of(example, tmp_path):
    """What an example prints, after a look at the picture that it draws."""
    picture = tmp_path / "picture.png"
    command = [sys.executable, ROOT / "examples" / example, "--output", picture]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000
    return done.stdout


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


def test_new_tokens(tmp_path):
    text = output_of("new_tokens.py", tmp_path)
    assert "0: rows('embed/embedding', slice(1000, None))" in text  # the plan's table
    assert "640 train, 116,160 frozen" in text
    assert "116,160 frozen numbers kept every bit; the other 640 changed" in text
    assert "losses without the new words kept every bit" in text
    before, after, _ = map(float, re.search(r"at the new words +(.+)", text)[1].split())
    assert after < before - 1


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
