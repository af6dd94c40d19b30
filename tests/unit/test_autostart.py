"""Commands that find no server: when one is started, and what is said where none is. The Engine is a stand-in."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from gpujobs import places
from gpujobs.core.errors import Unavailable
from gpujobs.service import autostart

ROOT = Path(__file__).parents[2]


class Answering(BaseHTTPRequestHandler):
    """What docker-py asks before anything else."""

    def do_GET(self) -> None:
        info = {"ApiVersion": "1.41", "ID": "E", "Runtimes": {"runc": {}}, "NCPU": 2, "MemTotal": 1 << 33}
        body = json.dumps(info).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "a unix socket has none"

    def log_message(self, *_: object) -> None:
        pass


class Threads(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory; on a machine without a system server."""
    monkeypatch.setattr(places, "SYSTEM_SETTINGS", tmp_path / "etc/server.yaml")
    monkeypatch.setattr(places, "SYSTEM_RUN", tmp_path / "run")
    return tmp_path


@pytest.fixture
def environ(place: Path) -> Iterator[dict[str, str]]:
    with Threads(str(place / "docker.sock"), Answering) as engine:
        threading.Thread(target=engine.serve_forever, daemon=True).start()
        yield {
            "DOCKER_HOST": f"unix://{place}/docker.sock", "GPUJOBS_STATE": str(place / "state"),
            "GPUJOBS_HOST": f"unix://{place}/s.sock", "PATH": os.environ["PATH"],
        }  # fmt: skip
        engine.shutdown()


def program(place: Path, text: str) -> str:
    """A program in the place of the server; what it does with its arguments is its affair."""
    path = place / "server"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def write_record(state: Path, **values: object) -> None:
    state.mkdir()
    (state / "server.json").write_text(json.dumps(values))


def test_a_server_that_is_still_starting_is_waited_for_and_not_called_dead(place, environ, monkeypatch):
    address = place / "s.sock"
    write_record(place / "state", **autostart.record_of_this(address))  # this process lives

    with socket.socket(socket.AF_UNIX) as listener:

        def listen(_: float) -> None:
            listener.bind(str(address))
            listener.listen()

        monkeypatch.setattr(autostart.time, "sleep", listen)
        assert autostart.ensure_server(environ) is None


def test_an_unclean_end_in_this_boot_is_told_with_the_last_lines(place, environ):
    writes = "import json\nfrom gpujobs.service.autostart import *\nprint(json.dumps(record_of_this(Path('s'))))"
    ended = subprocess.run([sys.executable, "-c", writes], capture_output=True, check=True, cwd=ROOT)
    write_record(place / "state", **json.loads(ended.stdout))
    (place / "state/server.log").write_text("one\ntwo\n")
    with pytest.raises(Unavailable, match=r"ended without being stopped. Its last lines:\n  one\n  two"):
        autostart.ensure_server(environ)


def test_a_server_starts_nowhere_beside_a_socket_that_the_system_server_has_left(place, environ):
    (place / "run").mkdir()
    places.system_socket().touch()
    with pytest.raises(Unavailable, match=r"server of this machine does not answer .*gpujobs\.sock is there"):
        autostart.ensure_server(environ)
    assert not (place / "state").exists()


def test_what_the_environment_names_from_here_on_means_the_same_to_the_server(place, environ, monkeypatch):
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    monkeypatch.setattr(sys, "executable", program(place, f"#!/bin/sh\nenv > {place}/env; echo listening on it\n"))
    said = autostart.ensure_server({**environ, "GPUJOBS_STATE": "mine", "LD_LIBRARY_PATH": "lib:/usr/lib:"})
    assert f"state in {place}/here/mine" in str(said)
    given = dict(line.split("=", 1) for line in (place / "env").read_text().splitlines())
    assert given["GPUJOBS_STATE"] == f"{place}/here/mine"
    assert given["LD_LIBRARY_PATH"] == f"{place}/here/lib:/usr/lib:{place}/here"


def test_a_state_directory_that_cannot_be_made_is_told_in_words(environ):
    with pytest.raises(Unavailable, match="the state directory /proc/gpujobs cannot be made"):
        autostart.ensure_server({**environ, "GPUJOBS_STATE": "/proc/gpujobs"})


LISTENS = """#!{python}
import os, socket, sys, time
with open("{place}/starts", "a") as file:
    file.write(f"{{os.getpid()}}\\n")
listener = socket.socket(socket.AF_UNIX)
listener.bind("{place}/s.sock")
listener.listen()
print("listening on unix://{place}/s.sock", flush=True)
time.sleep(60)
"""

COMMAND = """
import sys
from pathlib import Path
from gpujobs import places
from gpujobs.service import autostart
place = Path(sys.argv[1])
places.SYSTEM_SETTINGS, places.SYSTEM_RUN = place / "etc/server.yaml", place / "run"
sys.executable = str(place / "server")
print(autostart.ensure_server())
"""


def test_of_commands_that_come_at_once_one_starts_a_server_and_all_find_it(place, environ):
    program(place, LISTENS.format(python=sys.executable, place=place))
    commands = [
        subprocess.Popen([sys.executable, "-c", COMMAND, place], env=environ, cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    said = [command.communicate(timeout=60)[0].decode() for command in commands]
    pids = (place / "starts").read_text().split()
    for pid in pids:
        os.kill(int(pid), 9)
    assert [command.returncode for command in commands] == [0, 0, 0]
    assert sorted(text.partition(" (")[0].strip() for text in said) == ["None", "None", "started a server"]
    assert len(pids) == 1
