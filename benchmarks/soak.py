"""Is a training that is killed over and over the same as one that is left alone, bit for bit?

A small network learns the digits of scikit-learn through five stages. What is frozen differs from
stage to stage, whole and in part, and other multipliers follow schedules; `lrmult.migrate` carries
the state of the optimizer over. Checkpoints are written at random steps. The training is run once
as it is, and once in processes that are killed (SIGKILL) at random steps, some of them while they
write a checkpoint; each goes on where the last checkpoint was written.

It fails unless both end with the same bits, and all that was frozen kept its own in every stage.

    python -m benchmarks.soak                                  # 20,000 steps, 40 kills
    python -m benchmarks.soak --steps 300 --kills 2
"""

import argparse
import itertools
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import lrmult as lm

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=1e-3))
SIZES = [64, 32, 32, 32, 10]
# What addition would change: -0.0, a subnormal number, a NaN with a payload.
ODD = np.array([0x80000000, 0x00000001, 0x7FC12345, 0x7F800000], np.uint32).view(np.float32)
ALWAYS = lm.Rules([("spare", None), (lm.rows("layers[0]/kernel", slice(0, 8)), None)])


def stages(steps: int) -> list[lm.Rules]:
    """The rules of each fifth of a training."""
    thinned = np.random.default_rng(1).random((32, 32)) < 0.5
    warm = optax.linear_schedule(0.0, 1.0, steps // 4)
    fading = optax.cosine_decay_schedule(1.0, steps * 7 // 10)
    own: list[list[Any]] = [
        [("layers[:3]", None), ("layers[3]/bias", 0.5)],
        [("layers[:2]", None), ("layers[2]", warm), ("layers[3]", 2.0)],
        [
            (lm.neurons("layers[1]", slice(0, 16)), None),
            ("layers[0]", lm.During(0.3, steps // 2, steps * 11 // 20)),
            ("layers", fading),
        ],
        [(lm.elements("layers[1]/kernel", thinned), None), ("layers", fading)],
        [("layers[3]", None), ("layers", 0.1)],
    ]
    return [ALWAYS + rules for rules in own]


class Run(NamedTuple):
    """A training at one of its steps.

    Attributes:
        step: how many steps it has made.
        stage: the stage whose rules the state is for.
        params: the parameters.
        begun: those with which the stage began.
        state: the state of the optimizer.
    """

    step: int
    stage: int
    params: Any
    begun: Any
    state: Any


class Training:
    """A training in stages.

    Args:
        folder: where checkpoints are.
        steps: how many steps it takes.
        compact: as for `lrmult.wrap`.
        seed: of the steps after which checkpoints are written.
        report: is told what is done, and at which step.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        steps: int,
        compact: bool,
        seed: int,
        report: Callable[[str, int], None] = lambda what, step: None,
    ) -> None:
        self.file = folder / "latest.npz"
        self.steps, self.compact, self.report = steps, compact, report
        self.rules = stages(steps)
        self.random = random.Random(seed)
        digits = load_digits()
        self.images = np.asarray(digits.data / 16, np.float32)
        self.labels = np.asarray(digits.target, np.int32)

    def run(self) -> Run:
        """Train from the last checkpoint to the end."""
        run = self.restored() if self.file.exists() else self.fresh()
        self.report("resumed", run.step)
        while run.step < self.steps:
            run = self.in_stage(run)
            step = self.compiled(run.stage)
            end = (run.stage + 1) * self.steps // len(self.rules)
            while run.step < end:
                state, params = step(run.state, run.params, *self.batch(run.step))
                run = run._replace(step=run.step + 1, state=state, params=params)
                if run.step % 10 == 0:
                    self.report("step", run.step)
                if self.random.random() < 1 / min(200, self.steps / 20):
                    self.save(run)
            lm.assert_frozen(run.begun, run.params, self.rules[run.stage])
        self.save(run)
        return run

    def fresh(self) -> Run:
        """A training at its start."""
        rng = np.random.default_rng(0)
        layers = [
            {
                "kernel": jnp.asarray(rng.normal(0, inputs**-0.5, (inputs, outputs)), jnp.float32),
                "bias": jnp.zeros(outputs),
            }
            for inputs, outputs in itertools.pairwise(SIZES)
        ]
        params = {"layers": layers, "spare": jnp.asarray(ODD)}
        return Run(0, 0, params, params, self.optimizer(0).init(params))

    def optimizer(self, stage: int) -> Any:
        """What updates the parameters in a stage."""
        return lm.wrap(OPTIMIZER, self.rules[stage], compact=self.compact)

    def in_stage(self, run: Run) -> Run:
        """The same, with the state that the stage to come needs."""
        stage = run.step * len(self.rules) // self.steps
        if stage == run.stage:
            return run
        old, new = self.rules[run.stage], self.rules[stage]
        state = lm.migrate(run.state, run.params, OPTIMIZER, old, new, compact=self.compact)
        return run._replace(stage=stage, state=state, begun=run.params)

    def compiled(self, stage: int) -> Any:
        """One step of a stage."""
        tx = self.optimizer(stage)

        def loss(params, images, labels):
            hidden = images
            for layer in params["layers"]:
                logits = hidden @ layer["kernel"] + layer["bias"]
                hidden = jax.nn.gelu(logits)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        @jax.jit
        def step(state, params, images, labels):
            grads = jax.grad(loss)(params, images, labels)
            updates, state = tx.update(grads, state, params)
            return state, optax.apply_updates(params, updates)

        return step

    def batch(self, step: int) -> tuple[Any, Any]:
        """What a step learns from, which depends on nothing but its number."""
        chosen = np.random.default_rng(step).integers(len(self.labels), size=32)
        return self.images[chosen], self.labels[chosen]

    def save(self, run: Run) -> None:
        """Write a checkpoint; whoever kills this finds the one before."""
        lm.assert_frozen(run.begun, run.params, self.rules[run.stage])
        self.report("saving", run.step)
        leaves = jax.tree.leaves((run.params, run.begun, run.state))
        unfinished = self.file.with_suffix(".unfinished")
        with open(unfinished, "wb") as file:
            np.savez(file, *leaves, step=run.step, stage=run.stage)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.file)

    def restored(self) -> Run:
        """What the last checkpoint holds."""
        like = self.fresh()
        with np.load(self.file) as stored:
            step, stage = int(stored["step"]), int(stored["stage"])
            state = jax.eval_shape(self.optimizer(stage).init, like.params)
            treedef = jax.tree.structure((like.params, like.begun, state))
            leaves = [jnp.asarray(stored[f"arr_{i}"]) for i in range(treedef.num_leaves)]
        return Run(step, stage, *treedef.unflatten(leaves))

    def accuracy(self, run: Run) -> float:
        """How many of the digits are told."""
        hidden = self.images
        for layer in run.params["layers"]:
            logits = hidden @ layer["kernel"] + layer["bias"]
            hidden = jax.nn.gelu(logits)
        return float(np.mean(np.argmax(logits, -1) == self.labels))


def run_killed(folder: pathlib.Path, options: argparse.Namespace) -> list[int]:
    """Run a training in processes that are killed.

    Returns:
        The steps from which processes went on.
    """
    rng = random.Random(options.seed)
    kills = sorted(rng.sample(range(1, options.steps * 9 // 10), options.kills))
    resumed = []
    for number in range(len(kills) + 1):
        command = [sys.executable, __file__, "--folder", str(folder)]
        command += ["--steps", str(options.steps), "--seed", str(options.seed + number)]
        command += ["--compact"] * options.compact
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while_saving = rng.random() < 0.5
        for line in process.stdout or ():
            what, step = line.split()
            if what == "resumed":
                resumed.append(int(step))
            due = number < len(kills) and int(step) >= kills[number]
            if due and what == ("saving" if while_saving else "step"):
                time.sleep(rng.random() * 0.002)
                process.kill()
                break
        status = process.wait()
        if status != (-9 if number < len(kills) else 0):
            raise SystemExit(f"process {number} ended with {status}")
    return resumed


def same_bits(one: Any, other: Any) -> bool:
    """Whether two trees of arrays are the same."""
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in zip(*(map(np.asarray, jax.tree.leaves(t)) for t in (one, other)), strict=True)
    )


def compare(options: argparse.Namespace) -> None:
    """Train twice, and compare."""
    with tempfile.TemporaryDirectory() as name:
        folders = [pathlib.Path(name, each) for each in ("alone", "killed")]
        for folder in folders:
            folder.mkdir()
        trainings = [Training(f, options.steps, options.compact, options.seed) for f in folders]
        resumed = run_killed(folders[1], options)
        killed = trainings[1].restored()
        alone = trainings[0].run()
    begun = trainings[0].fresh().params
    lm.assert_frozen(begun, killed.params, ALWAYS)
    changed = sum(
        not same_bits(a, b)
        for a, b in zip(*map(jax.tree.leaves, (begun, killed.params)), strict=True)
    )
    print(f"{options.steps:,} steps; processes killed: {len(resumed) - 1}")
    print(f"others went on from steps {', '.join(map(str, resumed[1:]))}")
    print(f"{changed} of {len(jax.tree.leaves(begun))} arrays changed; all that was frozen did not")
    print(f"{trainings[0].accuracy(killed):.1%} of the digits are told")
    if not same_bits((alone.params, alone.state), (killed.params, killed.state)):
        raise SystemExit("the two trainings differ")
    print("weights and state are those of the training that was left alone, bit for bit")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compact", action="store_true", help="as for lrmult.wrap")
    parser.add_argument("--folder", type=pathlib.Path, help="only train, with checkpoints there")
    options = parser.parse_args()
    if options.folder:
        Training(
            options.folder,
            options.steps,
            options.compact,
            options.seed,
            lambda what, step: print(what, step, flush=True),
        ).run()
    else:
        compare(options)


if __name__ == "__main__":
    main()
