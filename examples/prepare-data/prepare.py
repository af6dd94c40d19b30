#!/usr/bin/env python3
"""Turn a directory of texts into token files for a language model: bytes as tokens, a part of them held out.

Needs nothing but Python. The same texts give the same bytes, however many workers there are: the paragraphs are
deduplicated and dealt out by their own hash, not by chance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import unicodedata
from pathlib import Path

END = b"\0"  # between documents; no text holds it


def paragraphs(path: Path) -> list[tuple[str, bytes]]:
    """Return (hash, tokens) of each paragraph of a file, in normal form; files that are no UTF-8 give none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        print(f"{path.name} is left out: {error}", file=sys.stderr, flush=True)
        return []
    found = []
    for block in unicodedata.normalize("NFC", text).replace("\0", "").split("\n\n"):
        lines = [" ".join(line.split()) for line in block.splitlines()]
        tokens = "\n".join(line for line in lines if line).encode()
        if tokens:
            found.append((hashlib.sha256(tokens).hexdigest(), tokens))
    return found


def write(path: Path, documents: list[bytes]) -> dict[str, object]:
    """Write documents one after the other, whole or not at all; return what the manifest says of the file."""
    content = b"".join(document + END for document in documents)
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)
    return {"file": path.name, "documents": len(documents), "tokens": len(content),
            "sha256": hashlib.sha256(content).hexdigest()}


def main() -> int:
    """Read, deduplicate, divide, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=Path, help="directory of *.txt files, searched through")
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument("--held-out", type=float, default=0.1, metavar="PART", help="default %(default)s")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    files = sorted(options.raw.rglob("*.txt"))
    if not files:
        parser.error(f"no *.txt in {options.raw}")

    with multiprocessing.Pool(options.workers) as pool:
        found = [item for part in pool.imap(paragraphs, files) for item in part]
    documents = dict(sorted(found))
    limit = int(options.held_out * (1 << 32))
    held_out = {name for name in documents if int(name[:8], 16) < limit}
    parts = {
        "train": [tokens for name, tokens in documents.items() if name not in held_out],
        "validation": [tokens for name, tokens in documents.items() if name in held_out],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = {name: write(options.out / f"{name}.bin", part) for name, part in parts.items()}
    (options.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(f"{len(files)} files, {len(found)} paragraphs, {len(documents)} different ones", flush=True)
    for name, entry in manifest.items():
        print(f"{name}: {entry['documents']} documents, {entry['tokens']} tokens, {entry['sha256'][:12]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
