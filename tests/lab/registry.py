"""A real image registry for tests: Debian's docker-registry with a configuration and storage of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.lab.engine import LabError, run

CONFIG = """\
version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {storage}}}
  delete: {{enabled: true}}
http: {{addr: "{address}"{tls}}}
{auth}"""


def _free_port(host: str) -> int:
    with closing(socket.socket()) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def install() -> None:
    """Install the package where it is missing, its service not started."""
    if shutil.which("docker-registry"):
        return
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        run("apt-get", "-qy", "install", "--no-install-recommends", "docker-registry", timeout=300)
    finally:
        if ours:
            policy.unlink()


@contextmanager
def registry(
    directory: Path, *, host: str = "127.0.0.1", storage: Path | None = None, login: bool = False, tls: bool = False
) -> Iterator[str]:
    """Run a registry within the block.

    Args:
        directory: For its configuration, log and, unless ``storage`` is given, images.
        host: The address that it listens on.
        login: It wants one from everybody, and knows nobody.
        tls: It speaks TLS, with a certificate that nobody has signed.

    Yields:
        ``host:port``.
    """
    install()
    address = f"{host}:{_free_port(host)}"
    directory.mkdir(parents=True, exist_ok=True)
    secure = ""
    if tls:
        run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=registry", "-days", "2",
            "-addext", f"subjectAltName=IP:{host}", "-keyout", str(directory / "key.pem"),
            "-out", str(directory / "cert.pem"))
        secure = f", tls: {{certificate: {directory}/cert.pem, key: {directory}/key.pem}}"
    auth = ""
    if login:
        (directory / "htpasswd").write_text("")
        auth = f"auth: {{htpasswd: {{realm: lab, path: {directory}/htpasswd}}}}\n"
    config = directory / "config.yml"
    config.write_text(CONFIG.format(storage=storage or directory / "storage", address=address, tls=secure, auth=auth))
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        _wait(address, process, directory / "log", "https" if tls else "http")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path, scheme: str) -> None:
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        if scheme == "https":
            name, _, port = address.partition(":")
            with closing(socket.socket()) as probe:
                if probe.connect_ex((name, int(port))) == 0:
                    return
        else:
            try:
                urllib.request.urlopen(f"http://{address}/v2/", timeout=2).close()
            except urllib.error.HTTPError:
                return
            except OSError:
                pass
            else:
                return
        time.sleep(0.05)
    raise LabError(f"docker-registry did not answer at {address}: {log.read_text()[-1000:]}")
