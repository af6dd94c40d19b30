#!/usr/bin/env python3
"""Run a model on a part of one GPU, keeping to the memory that the job asked for with ``gpus: {share: …}``."""

from __future__ import annotations

import argparse
import time

import torch

GIB = 1 << 30


def main() -> None:
    """Limit this process's memory, then answer made-up requests for a while."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-gib", type=float, required=True, help="the job's share, in GiB")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()

    total = torch.cuda.get_device_properties(0).total_memory
    # Beyond it PyTorch says "out of memory" to this process, instead of taking from the others on the card.
    torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gib * GIB / total))
    print(f"{options.memory_gib:g} GiB of {total / GIB:.1f} GiB on {torch.cuda.get_device_name(0)}", flush=True)

    model = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(d_model=1024, nhead=16, batch_first=True), num_layers=12
    )
    model = model.to("cuda", dtype=torch.bfloat16).eval()
    began, requests = time.monotonic(), 0
    with torch.inference_mode():
        while time.monotonic() - began < options.seconds:
            model(torch.randn(8, 256, 1024, device="cuda", dtype=torch.bfloat16))
            torch.cuda.synchronize()
            requests += 8
    rate = requests / (time.monotonic() - began)
    print(f"{rate:.0f} requests a second, at most {torch.cuda.max_memory_allocated() / GIB:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
