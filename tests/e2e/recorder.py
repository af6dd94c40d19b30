"""Writes down what an Engine tells of its containers, as a process of its own: ``python recorder.py SOCKET FILE``.

Nothing of the product is used, and nothing of it can stop this: one JSON line an event, across restarts of the Engine.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
from pathlib import Path


def record(path: str, file: Path) -> None:
    """Never ends by itself."""
    last = f"{time.time():.9f}"
    known: set[tuple[int, str, str]] = set()
    with file.open("w", buffering=1) as out:
        while True:
            connection = http.client.HTTPConnection("localhost")
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.sock.connect(path)
                connection.request("GET", f"/events?since={last}&filters=%7B%22type%22%3A%5B%22container%22%5D%7D")
                answer = connection.getresponse()
                while line := answer.readline():
                    event = json.loads(line)
                    key = (event["timeNano"], event["Actor"]["ID"], event["Action"])
                    if key not in known:
                        known.add(key)
                        out.write(json.dumps(event) + "\n")
                    last = f"{event['timeNano'] // 10**9}.{event['timeNano'] % 10**9:09d}"
            except (OSError, http.client.HTTPException, ValueError):
                pass
            finally:
                connection.close()
            time.sleep(0.02)


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]))
