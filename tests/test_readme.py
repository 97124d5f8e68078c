"""The sessions in the README print what it says they print.

``python tests/test_readme.py`` writes anew what they print.
"""

import contextlib
import io
import os
import pathlib
import re
import tempfile

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp

import lrmult as lm
from lrmult._command_line import main

README = pathlib.Path(__file__).parent.parent / "README.md"
SESSION = re.compile(
    r"(?<=<!-- session -->\n```console\n)\$ lrmult (.*)\n((?:[^`].*\n|\n)*)(?=```)"
)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x += nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm(name="ln1")(x))
        y = nn.gelu(nn.Dense(256, name="fc1")(nn.LayerNorm(name="ln2")(x)))
        return x + nn.Dense(64, name="fc2")(y)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(1000, 64, name="embed")(tokens)
        for i in range(4):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(10, name="head")(x)


def write_files(folder, readme):
    """What the sessions speak of: the rules, and a checkpoint before and after a run."""
    [rules] = re.findall(r"<!-- rules.toml -->\n```toml\n(.*?)```", readme, re.DOTALL)
    (folder / "rules.toml").write_text(rules)
    tokens = jnp.zeros((1, 5), jnp.int32)
    params = Transformer().init(jax.random.key(0), tokens)["params"]
    trained = lm.replace(params, "head/bias", jnp.full(10, 0.5))
    hurt = lm.replace(trained, lm.along("block_0/fc1/bias", 0, 3), 0.25)
    for name, tree in {"init": params, "after": hurt}.items():
        (folder / f"{name}.msgpack").write_bytes(flax.serialization.to_bytes(tree))


def printed(command):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(command.split())
    return out.getvalue()


def filled(readme):
    """The README, with what its sessions print."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_files(pathlib.Path(folder), readme)
        return SESSION.sub(lambda found: f"$ lrmult {found[1]}\n{printed(found[1])}", readme)


def test_the_sessions():
    readme = README.read_text()
    assert len(SESSION.findall(readme)) == 2
    assert filled(readme) == readme


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    README.write_text(filled(README.read_text()))
