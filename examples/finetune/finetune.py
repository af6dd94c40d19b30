#!/usr/bin/env python3
"""Fine-tune a small network to a new task, with checkpoints that resume at the exact step.

Needs numpy alone. The base network learns to tell two spirals apart; then its last layer is replaced, its first one
frozen, and the rest is tuned to three spirals of another handedness. An interrupted run that goes on ends with the
same weights, bit for bit, as one that was never interrupted: weights, momentum, the step and the state of the random
generator all are in the checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

HIDDEN = 64
Weights = dict[str, np.ndarray]


def spirals(count: int, arms: int, hand: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy points (count x 2) on the arms of a spiral, left- or right-handed, and the arm of each."""
    arm = random.integers(0, arms, count)
    radius = np.sqrt(random.uniform(0.05, 1.0, count))
    angle = hand * (radius * 1.5 * np.pi + 2.0 * np.pi * arm / arms)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return points + random.normal(0.0, 0.04, points.shape), arm


def layer(inputs: int, outputs: int, random: np.random.Generator) -> np.ndarray:
    """Return the first weights of a layer, the bias as their last row."""
    weights = random.normal(0.0, (2.0 / inputs) ** 0.5, (inputs + 1, outputs))
    weights[-1] = random.uniform(-1.0, 1.0, outputs) if outputs == HIDDEN else 0.0
    return weights


def forward(weights: Weights, points: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Return each layer's inputs with a column of ones for the bias, and the class probabilities."""
    ones = np.ones((len(points), 1))
    inputs = [np.hstack([3.0 * points, ones])]
    for name in ("first", "second"):
        inputs.append(np.hstack([np.maximum(inputs[-1] @ weights[name], 0.0), ones]))
    scores = inputs[-1] @ weights["last"]
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return inputs, scores / scores.sum(axis=1, keepdims=True)


class Tuner:
    """A network on its way, and everything that a checkpoint has to hold."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.step = 0
        self.weights: Weights = {
            "first": layer(2, HIDDEN, self.random),
            "second": layer(HIDDEN, HIDDEN, self.random),
            "last": layer(HIDDEN, 2, self.random),
        }
        self.momentum = {name: np.zeros_like(value) for name, value in self.weights.items()}

    def begin_tuning(self, arms: int) -> None:
        """Put a new last layer on the base network."""
        self.weights["last"] = layer(HIDDEN, arms, self.random)
        self.momentum = {name: np.zeros_like(value) for name, value in self.weights.items()}

    def update(self, points: np.ndarray, labels: np.ndarray, lr: float, frozen: tuple[str, ...] = ()) -> float:
        """Take a step on a batch; return its mean cross-entropy before the step."""
        inputs, probabilities = forward(self.weights, points)
        rows = np.arange(len(labels))
        loss = -np.log(probabilities[rows, labels] + 1e-12).mean()
        probabilities[rows, labels] -= 1.0
        delta = probabilities / len(labels)
        for name, given in zip(("last", "second", "first"), reversed(inputs), strict=True):
            gradient = given.T @ delta
            delta = ((delta @ self.weights[name].T) * (given > 0.0))[:, :-1]
            if name not in frozen:
                self.momentum[name] = 0.9 * self.momentum[name] - lr * gradient
                self.weights[name] = self.weights[name] + self.momentum[name]
        self.step += 1
        return float(loss)

    def digest(self) -> str:
        """A hash of all weights: two runs that end with the same one are the same, bit for bit."""
        return hashlib.sha256(b"".join(value.tobytes() for value in self.weights.values())).hexdigest()[:16]

    def save(self, directory: Path) -> None:
        """Write the checkpoint so that a reader finds the old one or the new one, never half of one."""
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / "checkpoint.npz.partial"
        with partial.open("wb") as file:
            np.savez(file, step=self.step, random=json.dumps(self.random.bit_generator.state),
                     **{f"weights.{name}": value for name, value in self.weights.items()},
                     **{f"momentum.{name}": value for name, value in self.momentum.items()})
            file.flush()
            os.fsync(file.fileno())
        partial.replace(directory / "checkpoint.npz")
        print(f"saved step {self.step}", flush=True)

    def restore(self, path: Path) -> None:
        """Take up a checkpoint."""
        with np.load(path) as saved:
            self.step = int(saved["step"])
            self.random.bit_generator.state = json.loads(str(saved["random"]))
            for name in self.weights:
                self.weights[name], self.momentum[name] = saved[f"weights.{name}"], saved[f"momentum.{name}"]


def checkpoint_to_read(own: Path, resume: str) -> Path | None:
    """This job's checkpoint, else that of the job to resume; its directory is beside ours, named by its id.

    A job's later attempts have the directory of its first one; another job has one of its own.
    """
    directories = [own]
    if resume:
        directories.append(own.with_name(f"{own.name.rpartition('-')[0]}-{resume}"))
    found = next((path for d in directories if (path := d / "checkpoint.npz").exists()), None)
    if resume and found is None:
        sys.exit(f"job {resume} left no checkpoint in {directories[-1]}")
    return found


def main() -> int:
    """Train the base, tune it, print what became of it; SIGTERM saves and ends with 143."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="of tuning, after a quarter as many for the base")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--arms", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stops.append(number))

    own = Path(os.environ.get("GPUJOBS_CHECKPOINT_DIR", "checkpoints"))
    base_steps = options.steps // 4
    total = base_steps + options.steps
    tuner = Tuner(options.seed)
    if (path := checkpoint_to_read(own, os.environ.get("RESUME", ""))) is not None:
        tuner.restore(path)
        print(f"resumed at step {tuner.step} of {total}", flush=True)
    else:
        print(f"started: {base_steps} steps for the base, {options.steps} of tuning", flush=True)

    while tuner.step < total and not stops:
        tuning = tuner.step >= base_steps
        if tuner.step == base_steps:
            tuner.begin_tuning(options.arms)
        arms, hand = (options.arms, -1) if tuning else (2, 1)
        points, labels = spirals(options.batch, arms, hand, tuner.random)
        loss = tuner.update(points, labels, 0.02 if tuning else 0.05, ("first",) if tuning else ())
        if tuner.step % options.save_every == 0 or tuner.step == total:
            print(f"{'tuning' if tuning else 'base'} step {tuner.step} loss {loss:.4f}", flush=True)
            tuner.save(own)
    if tuner.step < total:
        tuner.save(own)
        return 128 + signal.SIGTERM

    points, labels = spirals(2000, options.arms, -1, np.random.default_rng(0))
    accuracy = float((forward(tuner.weights, points)[1].argmax(axis=1) == labels).mean())
    print(f"held-out accuracy {accuracy:.4f}, weights {tuner.digest()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
