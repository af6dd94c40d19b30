#!/usr/bin/env python3
"""Train a small classifier with Keras on all GPUs of the job, with backups that resume.

The data are made up (two interleaved spirals), so that nothing has to be downloaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf


def spirals(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points (count x 2) on two noisy spirals, and which of the two each is on."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    turn = np.sqrt(random.uniform(0.05, 1.0, count)) * 3 * np.pi
    angle = turn + np.pi * labels
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1) * turn[:, None] / (3 * np.pi)
    points += random.normal(0.0, 0.02, points.shape)
    return points.astype(np.float32), labels.astype(np.int64)


def backups(resume: str) -> Path:
    """Where Keras backs up to; begun with the backup of the job to resume, whose directory is beside ours."""
    own = Path(os.environ.get("GPUJOBS_CHECKPOINT_DIR", "checkpoints"))
    former = own.with_name(f"{own.name.rpartition('-')[0]}-{resume}") / "backup"
    target = own / "backup"
    if resume and former.exists() and not target.exists():
        shutil.copytree(former, target)
    return target


def main() -> None:
    """Train, and print the accuracy on points that were held out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=512, help="points in a minibatch of one GPU")
    options = parser.parse_args()

    strategy = tf.distribute.MirroredStrategy()
    replicas = strategy.num_replicas_in_sync
    gpus = tf.config.list_physical_devices("GPU")
    print(f"{replicas} replicas on {' '.join(gpu.name for gpu in gpus) or 'the CPU'}", flush=True)
    batch = options.batch * replicas
    points, labels = spirals(200_000, seed=1)
    train = tf.data.Dataset.from_tensor_slices((points, labels)).shuffle(len(points), seed=1).batch(batch)
    train = train.prefetch(tf.data.AUTOTUNE)

    with strategy.scope():
        model = tf.keras.Sequential([
            tf.keras.Input((2,)),
            *(tf.keras.layers.Dense(128, activation="relu") for _ in range(3)),
            tf.keras.layers.Dense(2),
        ])  # fmt: skip
        model.compile(
            optimizer=tf.keras.optimizers.Adam(1e-3 * replicas),
            loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    keep = tf.keras.callbacks.BackupAndRestore(str(backups(os.environ.get("RESUME", ""))), delete_checkpoint=False)
    model.fit(train, epochs=options.epochs, callbacks=[keep], verbose=2)
    loss, accuracy = model.evaluate(*spirals(20_000, seed=2), batch_size=batch, verbose=0)
    print(f"held-out loss {loss:.4f} accuracy {accuracy:.4f}", flush=True)


if __name__ == "__main__":
    main()
