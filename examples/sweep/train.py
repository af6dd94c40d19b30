#!/usr/bin/env python3
"""Train a logistic regression on two noisy rings' worth of points, and write down how it went.

Needs nothing but Python, so that the sweep runs anywhere: put your training in its place.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from pathlib import Path

FEATURES = 6


def points(count: int, seed: int) -> list[tuple[list[float], int]]:
    """Return (features, class): a point on one of two rings, described by its polynomials up to degree two."""
    chance = random.Random(seed)
    result = []
    for _ in range(count):
        label = chance.randrange(2)
        angle, radius = chance.uniform(0.0, 2.0 * math.pi), 0.6 + 0.5 * label + chance.gauss(0.0, 0.15)
        x, y = radius * math.cos(angle), radius * math.sin(angle)
        result.append(([1.0, x, y, x * x, x * y, y * y], label))
    return result


def probability(weights: list[float], features: list[float]) -> float:
    """The model's probability of class 1."""
    score = sum(weight * value for weight, value in zip(weights, features, strict=True))
    return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, score))))


def train(lr: float, momentum: float, epochs: int) -> list[float]:
    """Return the weights after SGD with momentum, a point at a time."""
    data = points(400, seed=1)
    weights, speed = [0.0] * FEATURES, [0.0] * FEATURES
    chance = random.Random(2)
    for _ in range(epochs):
        chance.shuffle(data)
        for features, label in data:
            error = probability(weights, features) - label
            for i, value in enumerate(features):
                speed[i] = momentum * speed[i] - lr * error * value
                weights[i] += speed[i]
    return weights


def main() -> None:
    """Train with the given settings; the result is one JSON file, named by the element of the array."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--momentum", type=float, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    weights = train(options.lr, options.momentum, options.epochs)
    test = points(1000, seed=3)
    right = sum((probability(weights, features) > 0.5) == bool(label) for features, label in test)
    result = {"lr": options.lr, "momentum": options.momentum, "accuracy": right / len(test)}
    index = os.environ.get("GPUJOBS_ARRAY_INDEX", "0")
    (options.out / f"{index}.json").write_text(json.dumps(result) + "\n")
    print(f"lr {options.lr:g} momentum {options.momentum:g} accuracy {result['accuracy']:.3f}", flush=True)


if __name__ == "__main__":
    main()
