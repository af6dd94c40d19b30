#!/usr/bin/env python3
"""A stand-in for a labelling service: works through a list, answers on its port, stops cleanly when it is asked to."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Answers(BaseHTTPRequestHandler):
    """Says that it is well."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Checks every second are not worth a line each."""


def main() -> int:
    """Work through the list; what is done is in /out, also after SIGINT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--pace", type=float, default=0.1, help="seconds for an item")
    options = parser.parse_args()
    stopping = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stopping.set())
    server = ThreadingHTTPServer(("", 8000), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {name: os.environ[name] for name in ("MODEL", "BATCH", "GREETING", "LOG_LEVEL")}
    print("settings", json.dumps(settings, sort_keys=True), flush=True)
    done = 0
    while done < options.items and not stopping.is_set():
        time.sleep(options.pace)
        Path("/scratch/item").write_text(str(done))
        done += 1
    Path("/out/labels.json").write_text(json.dumps({"done": done}) + "\n")
    print(f"{'stopped' if stopping.is_set() else 'finished'} after {done} items", flush=True)
    server.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
