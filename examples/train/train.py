#!/usr/bin/env python3
"""Train a small neural network on handwritten digits, with checkpoints that resume at the exact step.

Needs numpy alone. The data set is the UCI optical recognition of handwritten digits: one line an image, its
64 pixel values (0-16) and its digit. An interrupted run that is started again ends with the same weights, bit
for bit, as one that was never interrupted: weights, momentum, the position within the epoch and the state of
the random generator all are in the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

PIXELS, DIGITS = 64, 10


def load(path: Path, held_out: float = 0.2) -> tuple[np.ndarray, ...]:
    """Return (train images, train digits, held-out images, held-out digits); images are floats in 0..1.

    The split is always the same, whatever the seed of the run, so that accuracies can be compared.
    """
    table = np.loadtxt(path, delimiter=",")
    images, digits = table[:, :PIXELS] / 16.0, table[:, PIXELS].astype(np.int64)
    order = np.random.default_rng(0).permutation(len(table))
    cut = int(len(table) * (1.0 - held_out))
    return images[order[:cut]], digits[order[:cut]], images[order[cut:]], digits[order[cut:]]


class Trainer:
    """A two-layer perceptron, its optimiser (SGD with momentum) and everything a checkpoint must hold."""

    def __init__(self, hidden: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.weights = {
            "w1": self.rng.normal(0.0, (2.0 / PIXELS) ** 0.5, (PIXELS, hidden)),
            "b1": np.zeros(hidden),
            "w2": self.rng.normal(0.0, (2.0 / hidden) ** 0.5, (hidden, DIGITS)),
            "b2": np.zeros(DIGITS),
        }
        self.momentum = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self.order = np.zeros(0, dtype=np.int64)  # this epoch's order of the training images
        self.step = 0

    def forward(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (hidden activations, class probabilities) of a batch."""
        hidden = np.maximum(images @ self.weights["w1"] + self.weights["b1"], 0.0)
        scores = hidden @ self.weights["w2"] + self.weights["b2"]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return hidden, scores / scores.sum(axis=1, keepdims=True)

    def update(self, images: np.ndarray, digits: np.ndarray, lr: float, decay: float = 0.9) -> float:
        """Take one step on a batch; return its mean cross-entropy before the step."""
        rows = np.arange(len(digits))
        hidden, probabilities = self.forward(images)
        loss = -np.log(probabilities[rows, digits] + 1e-12).mean()
        probabilities[rows, digits] -= 1.0
        delta2 = probabilities / len(digits)
        delta1 = (delta2 @ self.weights["w2"].T) * (hidden > 0.0)
        gradients = {"w1": images.T @ delta1, "b1": delta1.sum(axis=0),
                     "w2": hidden.T @ delta2, "b2": delta2.sum(axis=0)}
        for name, gradient in gradients.items():
            self.momentum[name] = decay * self.momentum[name] - lr * gradient
            self.weights[name] += self.momentum[name]
        self.step += 1
        return float(loss)

    def save(self, directory: Path) -> None:
        """Write the checkpoint so that a reader finds the old one or the new one, never half of one."""
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / "checkpoint.npz.partial"
        with partial.open("wb") as file:
            np.savez(file, step=self.step, order=self.order, rng=json.dumps(self.rng.bit_generator.state),
                     **{f"weights.{name}": value for name, value in self.weights.items()},
                     **{f"momentum.{name}": value for name, value in self.momentum.items()})
            file.flush()
            os.fsync(file.fileno())
        partial.replace(directory / "checkpoint.npz")

    def restore(self, directory: Path) -> bool:
        """Take up the checkpoint of the directory; return whether there is one."""
        path = directory / "checkpoint.npz"
        if not path.exists():
            return False
        with np.load(path) as saved:
            if saved["weights.w1"].shape != self.weights["w1"].shape:
                sys.exit(f"{path} holds a network of {saved['weights.w1'].shape[1]} hidden units")
            self.step, self.order = int(saved["step"]), saved["order"]
            self.rng.bit_generator.state = json.loads(str(saved["rng"]))
            for name in self.weights:
                self.weights[name] = saved[f"weights.{name}"]
                self.momentum[name] = saved[f"momentum.{name}"]
        return True


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("/data/digits.csv.gz"), help="default %(default)s")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32, help="images in a minibatch")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--hidden", type=int, default=64, help="hidden units")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--checkpoint-dir", type=Path,
                        default=Path(os.environ.get("GPUJOBS_CHECKPOINT_DIR", "checkpoints")))
    return parser.parse_args()


def main() -> int:
    """Train to the last epoch, or until SIGTERM, which saves and ends with 143."""
    options = arguments()
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stops.append(number))
    devices = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    print("GPUs visible:", " ".join(devices) or "none", flush=True)

    images, digits, test_images, test_digits = load(options.data)
    trainer = Trainer(options.hidden, options.seed)
    resumed = trainer.restore(options.checkpoint_dir)
    steps_per_epoch = -(-len(images) // options.batch)
    total = options.epochs * steps_per_epoch
    print(f"{'resumed' if resumed else 'started'} at step {trainer.step} of {total}: {len(images)} images, "
          f"{options.hidden} hidden units, lr {options.lr}, seed {options.seed}", flush=True)

    began, first = time.monotonic(), trainer.step
    while trainer.step < total and not stops:
        position = trainer.step % steps_per_epoch
        if position == 0:
            trainer.order = trainer.rng.permutation(len(images))
        batch = trainer.order[position * options.batch:(position + 1) * options.batch]
        loss = trainer.update(images[batch], digits[batch], options.lr)
        if trainer.step % options.log_every == 0 or trainer.step == total:
            epoch = (trainer.step - 1) // steps_per_epoch + 1
            print(f"epoch {epoch} step {trainer.step} loss {loss:.4f}", flush=True)
        if trainer.step % options.checkpoint_every == 0:
            trainer.save(options.checkpoint_dir)
    trainer.save(options.checkpoint_dir)
    if trainer.step < total:
        print(f"SIGTERM: saved at step {trainer.step}", flush=True)
        return 128 + signal.SIGTERM

    accuracy = float((trainer.forward(test_images)[1].argmax(axis=1) == test_digits).mean())
    print(f"held-out accuracy {accuracy:.4f} on {len(test_digits)} images", flush=True)
    print(f"{total - first} steps in {time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
