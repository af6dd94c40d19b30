#!/usr/bin/env python3
"""Train a small convolutional network with DistributedDataParallel, with checkpoints that resume.

Started by torchrun, one process a GPU. The images are made up on the way (blobs whose place is their class), so that
nothing has to be downloaded: put a data set of your own into ``Blobs``.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

SIDE, CLASSES = 32, 16


class Blobs(Dataset[tuple[torch.Tensor, int]]):
    """Noisy images of 1 x SIDE x SIDE with one bright blob; the class is the cell of a 4 x 4 grid that it is in."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        random = torch.Generator().manual_seed(self.seed * self.count + index)
        label = int(torch.randint(CLASSES, (), generator=random))
        cell = SIDE // 4
        place = torch.rand(2, generator=random) * (cell - 1)
        row, column = (label // 4) * cell + place[0], (label % 4) * cell + place[1]
        grid = torch.arange(SIDE, dtype=torch.float32)
        distance = (grid[:, None] - row) ** 2 + (grid[None, :] - column) ** 2
        image = torch.exp(-distance / 8.0) + 0.5 * torch.randn(SIDE, SIDE, generator=random)
        return image[None], label


def network() -> nn.Module:
    """Three convolutions and a linear layer: logits of CLASSES from images of 1 x SIDE x SIDE."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * (SIDE // 8) ** 2, CLASSES),
    )  # fmt: skip


def checkpoint_to_read(own: Path, resume: str) -> Path | None:
    """This job's checkpoint, else that of the job to resume; its directory is beside ours, named by its id."""
    candidates = [own]
    if resume:
        candidates.append(own.with_name(f"{own.name.rpartition('-')[0]}-{resume}"))
    return next((path for d in candidates if (path := d / "checkpoint.pt").exists()), None)


def save(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint so that a reader finds the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def accuracy(model: nn.Module, loader: DataLoader[tuple[torch.Tensor, int]], device: torch.device) -> float:
    """The part of the held-out images that all processes together get right."""
    model.eval()
    totals = torch.zeros(2, device=device)
    with torch.no_grad():
        for images, labels in loader:
            hits = model(images.to(device)).argmax(1) == labels.to(device)
            totals += torch.stack([hits.sum(), torch.tensor(hits.numel(), device=device)])
    dist.all_reduce(totals)
    model.train()
    return float(totals[0] / totals[1])


def main() -> None:
    """Train to the last epoch, or until SIGTERM, which saves at the end of a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128, help="images in a minibatch of one GPU")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    dist.init_process_group("nccl")
    rank, local = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    torch.manual_seed(1)
    if rank == 0:
        print(f"{dist.get_world_size()} processes, {torch.cuda.get_device_name(device)}", flush=True)

    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stops.append(number))
    own = Path(os.environ.get("GPUJOBS_CHECKPOINT_DIR", "checkpoints"))

    model = DistributedDataParallel(network().to(device), device_ids=[local])
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.lr)
    first = 0
    if (path := checkpoint_to_read(own, os.environ.get("RESUME", ""))) is not None:
        state = torch.load(path, map_location=device, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["epoch"]
        if rank == 0:
            print(f"resumed after epoch {first} from {path}", flush=True)

    train, held_out = Blobs(50_000, seed=1), Blobs(5_000, seed=2)
    sampler = DistributedSampler(train, shuffle=True, seed=1)
    common = {"batch_size": options.batch, "num_workers": 2, "pin_memory": True, "persistent_workers": True}
    loader = DataLoader(train, sampler=sampler, drop_last=True, **common)
    test_loader = DataLoader(held_out, sampler=DistributedSampler(held_out, shuffle=False), **common)

    stopping = torch.zeros(1, device=device)
    for epoch in range(first, options.epochs):
        sampler.set_epoch(epoch)  # another order in each epoch, the same after a resume
        loss = torch.zeros(())
        for images, labels in loader:
            logits = model(images.to(device, non_blocking=True))
            loss = nn.functional.cross_entropy(logits, labels.to(device, non_blocking=True))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        right = accuracy(model, test_loader, device)
        if rank == 0:
            print(f"epoch {epoch + 1} loss {loss.item():.4f} held-out accuracy {right:.4f}", flush=True)
            save(own / "checkpoint.pt", {
                "model": model.module.state_dict(), "optimiser": optimiser.state_dict(), "epoch": epoch + 1,
            })  # fmt: skip
        # All leave after the same epoch, or the others would wait for the one that left.
        stopping.fill_(len(stops))
        dist.all_reduce(stopping)
        if stopping.item():
            break
    dist.destroy_process_group()
    if stops:
        raise SystemExit(128 + stops[0])


if __name__ == "__main__":
    main()
