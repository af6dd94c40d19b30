"""``gpujobs doctor`` on this machine: with the lab's Engine and NVML, with and without rights, with things broken."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from gpujobs.adapters import ledgercheck, probes
from gpujobs.adapters.store import migrate
from gpujobs.core import checkup
from gpujobs.core.facts import NvmlFacts
from gpujobs.core.finding import Level
from gpujobs.service import doctor
from tests.lab import accounts, checkout, engine, nvml
from tests.lab.__main__ import LIBRARY_DIR

PROGRAM = checkout.program()


@pytest.fixture(scope="session")
def lab():
    found = engine.ensure()
    nvml.build(LIBRARY_DIR)
    return found


@pytest.fixture
def machine():
    """Eight A100 in a state file of this test's own, where other accounts can read it too."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "nvml.state"
        found = nvml.dgx_a100().fit_host()
        found.write(path)
        path.chmod(0o644)
        yield found, path


@pytest.fixture
def environment(lab, machine, tmp_path):
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "DOCKER_HOST": lab.host,
        "LD_LIBRARY_PATH": str(LIBRARY_DIR),
        "LAB_NVML_STATE": str(machine[1]),
        "GPUJOBS_STATE": str(tmp_path / "state"),
        "GPUJOBS_HOST": f"unix://{tmp_path}/none.sock",
    }


def run(environment, *arguments, limit=60.0):
    return subprocess.run(
        [PROGRAM, "doctor", *arguments], env=environment, capture_output=True, text=True, timeout=limit, check=False
    )


def examined(environment):
    """The findings by area, and the exit code."""
    done = run(environment, "--json")
    assert done.stderr == ""
    return by_area(json.loads(done.stdout)), done.returncode


def by_area(answer):
    areas: dict[str, list[dict[str, str]]] = {}
    for item in answer["findings"]:
        assert set(item) == {"area", "level", "message", "hint"}
        areas.setdefault(item["area"], []).append(item)
    return areas


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# --- the whole command


def test_the_machine_with_the_labs_engine_and_gpus_is_looked_at_in_full(environment, lab):
    areas, code = examined(environment)
    assert set(areas) == set(checkup.AREAS)
    assert any(lab.host in item["message"] for item in areas["engine"])
    assert "driver 535.183.01, up to CUDA 12.2, 8 GPUs" in areas["driver"][0]["message"]
    assert "GiB free" in areas["disk"][0]["message"]
    assert areas["init"][0]["level"] == areas["kernel"][0]["level"] == "ok"
    errors = [item for items in areas.values() for item in items if item["level"] == "error"]
    assert code == (3 if errors else 0)
    answer = json.loads(run(environment, "--json").stdout)
    assert answer["ok"] is (not errors)


def test_nothing_is_made_on_the_machine(environment, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert run(environment).returncode in {0, 3}
    assert sorted(tmp_path.rglob("*")) == before


def test_the_table_names_each_finding_and_what_to_do(environment):
    done = run(environment)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["AREA", "LEVEL", "FINDING", "WHAT", "TO", "DO"]
    assert {line.split()[0] for line in lines[1:-2]} == set(checkup.AREAS)
    assert lines[-1].endswith("ok")
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_table_folds_to_the_terminal(environment, columns):
    command = f"stty cols {columns}; exec {PROGRAM} doctor"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], env={**environment, "TERM": "dumb", "SHELL": "/bin/sh"},
        capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    words = [word for line in done.stdout.splitlines() for word in line.split()]
    assert "→" in words
    longest = max(len(word) for word in words)
    assert max(len(line) for line in done.stdout.splitlines()) <= max(columns, longest + 20)


def test_an_account_without_access_to_docker_gets_all_the_rest_and_exit_4(environment, machine, lab):
    account = accounts.ensure()[0]
    given = {name: environment[name] for name in ("DOCKER_HOST", "LD_LIBRARY_PATH", "LAB_NVML_STATE")}
    done = accounts.run_as(account, [str(PROGRAM), "doctor", "--json"], env=given)
    assert (done.returncode, done.stderr) == (4, "")
    areas = by_area(json.loads(done.stdout))
    assert [item["level"] for item in areas["engine"]] == ["error"]
    assert f"uid {account.uid}" in areas["engine"][0]["message"]
    assert "8 GPUs" in areas["driver"][0]["message"]
    assert f"/home/{account.name}" in areas["state"][0]["message"]
    assert "Traceback" not in done.stdout


def test_an_account_that_a_server_of_root_serves_is_not_sent_to_docker(environment, machine):
    account = accounts.ensure()[0]
    path = machine[1].with_name("s.sock")
    given = {name: environment[name] for name in ("DOCKER_HOST", "LD_LIBRARY_PATH", "LAB_NVML_STATE")}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        os.chown(path, 0, account.gid)
        path.chmod(0o660)
        done = accounts.run_as(
            account, [str(PROGRAM), "doctor", "--json"], env={**given, "GPUJOBS_HOST": f"unix://{path}"}
        )
        path.chmod(0o600)
        shut_out = accounts.run_as(
            account, [str(PROGRAM), "doctor", "--json"], env={**given, "GPUJOBS_HOST": f"unix://{path}"}
        )
    areas = by_area(json.loads(done.stdout))
    assert done.returncode == 0, [item for items in areas.values() for item in items if item["level"] == "error"]
    assert {item["level"] for area in ("engine", "runtime", "cgroup", "server") for item in areas[area]} == {"ok"}
    assert f"pid {os.getpid()}, uid 0" in areas["server"][0]["message"]
    assert shut_out.returncode == 4
    assert "may not use the server" in by_area(json.loads(shut_out.stdout))["server"][0]["message"]


def test_without_docker_a_driver_a_path_or_a_home_it_still_says_what_it_sees(tmp_path):
    bare = {"PATH": str(tmp_path), "DOCKER_HOST": f"unix://{tmp_path}/no.sock", "GPUJOBS_STATE": f"{tmp_path}/state"}
    done = run(bare, "--json")
    assert (done.returncode, done.stderr) == (4, "")
    areas = by_area(json.loads(done.stdout))
    assert "does not answer" in areas["engine"][0]["message"]
    assert "no NVIDIA driver" in areas["driver"][0]["message"]
    assert "not known" in areas["runc"][0]["message"]


def test_an_address_of_another_kind_is_told(environment):
    areas, code = examined({**environment, "DOCKER_HOST": "ssh://elsewhere"})
    assert code == 4
    assert "ssh://elsewhere" in areas["engine"][0]["message"]


def test_an_engine_that_takes_the_connection_and_says_nothing_is_not_waited_for(environment, tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "mute.sock"))
        listener.listen()
        began = time.monotonic()
        areas, code = examined({**environment, "DOCKER_HOST": f"unix://{tmp_path}/mute.sock"})
    assert code == 4
    assert areas["engine"][0]["level"] == "error"
    assert time.monotonic() - began < 30


# --- the driver


def test_a_driver_whose_halves_differ_is_an_error_that_says_reboot(environment, machine):
    found, path = machine
    found.driver = "mismatch"
    found.write(path)
    areas, code = examined(environment)
    assert code == 3
    assert "differ in version" in areas["driver"][0]["message"]
    assert "Reboot" in areas["driver"][0]["hint"]


def test_a_driver_that_is_not_loaded_is_an_error(environment, machine):
    found, path = machine
    found.driver = "absent"
    found.write(path)
    areas, code = examined(environment)
    assert code == 3
    assert "not loaded" in areas["driver"][0]["message"]


def test_the_module_of_the_kernel_is_compared_with_the_library(tmp_path):
    for text, version in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\n", "575.57.08"),
        ("something else\n", ""),
    ):
        path = tmp_path / "version"
        path.write_text(text)
        assert doctor._kernel_module(path) == version
    assert doctor._kernel_module(tmp_path / "none") == ""


def test_a_library_that_crashes_or_hangs_is_a_gap(monkeypatch):
    monkeypatch.setattr(doctor, "NVML_SECONDS", 0.3)
    for ask in (lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: time.sleep(60)):
        monkeypatch.setattr(doctor, "_ask_nvml", ask)
        began = time.monotonic()
        assert doctor._nvml().code is None
        assert time.monotonic() - began < 5
    monkeypatch.setattr(doctor, "_ask_nvml", lambda: NvmlFacts(gpus=3))
    assert doctor._nvml() == NvmlFacts(gpus=3)


# --- programs


def test_old_versions_on_the_path_are_found_with_their_holes(environment, tmp_path):
    script(tmp_path / "bin/nvidia-ctk", "echo 'NVIDIA Container Toolkit CLI version 1.14.3'; echo 'commit: 53b24618'")
    script(tmp_path / "bin/runc", "echo 'runc version 1.1.11'; echo 'spec: 1.0.2-dev'")
    areas, code = examined({**environment, "PATH": f"{tmp_path}/bin:/usr/bin:/bin"})
    assert code == 3
    assert areas["toolkit"][0]["level"] == "error"
    for cve in ("CVE-2025-23266", "CVE-2025-23359", "CVE-2024-0132"):
        assert cve in areas["toolkit"][0]["message"]
    assert "1.19.1" in areas["toolkit"][1]["hint"]
    old = [item for item in areas["runc"] if str(tmp_path) in item["message"]]
    assert "CVE-2024-21626" in old[0]["message"]
    assert old[0]["level"] == "error"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sleep 100", "no answer in 1 s"),
        ("yes", "no answer in 1 s"),
        ("exit 1", "says ''"),
        ("echo 'NVIDIA Container Toolkit CLI version unknown'", "unknown"),
        ("printf '\\033[31m\\377'", "says"),
    ],
)
def test_a_program_that_hangs_floods_or_fails_is_a_gap(environment, tmp_path, monkeypatch, text, said):
    script(tmp_path / "bin/nvidia-ctk", text)
    monkeypatch.setattr(doctor, "PROGRAM_SECONDS", 1.0)
    began = time.monotonic()
    programs = doctor._programs({"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}, None, doctor.Sources())
    assert time.monotonic() - began < 8
    found = [
        item
        for item in checkup._toolkit(facts_with(environment, tmp_path, programs=programs))
        if item.level is not Level.OK
    ]
    assert [item.level for item in found] == [Level.WARNING]
    assert said in found[0].message


def test_a_program_that_cannot_be_started_is_a_gap(tmp_path):
    (tmp_path / "nvidia-ctk").write_bytes(b"\x7fELF")
    (tmp_path / "nvidia-ctk").chmod(0o755)
    text, problem = probes.output_of([str(tmp_path / "nvidia-ctk")], {}, 1.0)
    assert text == ""
    assert "does not start" in problem


def test_a_distributions_changelog_says_what_it_has_mended(tmp_path):
    def changelog(package, text):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "changelog.Debian.gz").write_bytes(gzip.compress(text.encode()))

    changelog("runc", "runc (1.1.5+ds1-1+deb12u1) bookworm-security; urgency=high\n\n  * CVE-2024-21626: leaked fds\n")
    assert doctor._mended(tmp_path, ("runc",), "1.1.5+ds1") == ("CVE-2024-21626",)
    assert doctor._mended(tmp_path, ("runc",), "1.1.12") == ()  # another runc than the package's
    changelog("runc", "\0" * 50_000_000)
    assert doctor._mended(tmp_path, ("runc",), "1.1.5+ds1") == ()
    (tmp_path / "runc/changelog.Debian.gz").write_text("no gzip")
    assert doctor._mended(tmp_path, ("runc", "runc-app"), "1.1.5+ds1") == ()


# --- files of the toolkit


def facts_with(environment, tmp_path, **more):
    """The machine's facts from files below ``tmp_path``, where a test has put any."""
    from dataclasses import replace

    sources = doctor.Sources(
        configuration=tmp_path / "config.toml", settings=tmp_path / "server.yaml", devices=tmp_path / "dev",
        kernel_module=tmp_path / "module",
    )  # fmt: skip
    return replace(doctor.gather({**environment, "PATH": str(tmp_path)}, sources), **more)


def toolkit_of(facts):
    return [item for item in checkup.findings(facts) if item.area == "toolkit" and "config.toml" in item.message]


def test_a_configuration_that_silently_gives_no_gpu_is_an_error(environment, tmp_path):
    (tmp_path / "config.toml").write_text(
        'accept-nvidia-visible-devices-envvar-when-unprivileged = false\nswarm-resource = "DOCKER_RESOURCE_GPU"\n'
    )
    found = toolkit_of(facts_with(environment, tmp_path))
    assert [item.level for item in found] == [Level.ERROR, Level.ERROR]
    assert "silently gives jobs no GPU" in found[0].message


def test_cdi_specifications_are_looked_for_where_the_configuration_says(environment, tmp_path):
    (tmp_path / "config.toml").write_text(
        f'[nvidia-container-runtime]\nmode = "cdi"\nmodes.cdi.spec-dirs = ["{tmp_path}/cdi"]\n'
    )
    assert toolkit_of(facts_with(environment, tmp_path))[0].level is Level.ERROR
    (tmp_path / "cdi").mkdir()
    (tmp_path / "cdi/net.yaml").write_text("kind: vendor.com/net\n")
    assert toolkit_of(facts_with(environment, tmp_path))[0].level is Level.ERROR
    (tmp_path / "cdi/nvidia.yaml").write_text("cdiVersion: 0.5.0\nkind: nvidia.com/gpu\n")
    assert [item.level for item in toolkit_of(facts_with(environment, tmp_path))] == [Level.OK]


def test_a_fifo_or_a_directory_in_the_configurations_place_is_a_gap_and_not_waited_for(environment, tmp_path):
    os.mkfifo(tmp_path / "config.toml")
    assert toolkit_of(facts_with(environment, tmp_path))[0].level is Level.WARNING
    (tmp_path / "config.toml").unlink()
    (tmp_path / "config.toml").mkdir()
    assert toolkit_of(facts_with(environment, tmp_path))[0].level is Level.WARNING


def test_the_engines_own_xdg_config_home_moves_the_file(tmp_path):
    listen = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(flush=True)"
    listener = subprocess.Popen(
        [sys.executable, "-c", f"{listen}; sys.stdin.read()", str(tmp_path / "d.sock")],
        env={"XDG_CONFIG_HOME": str(tmp_path / "xdg")}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        found = doctor._configuration_of(f"unix://{tmp_path}/d.sock", Path("/default"))
        listener.kill()
    assert found == tmp_path / "xdg/nvidia-container-runtime/config.toml"
    assert doctor._configuration_of(f"unix://{tmp_path}/d.sock", Path("/default")) == Path("/default")
    assert doctor._configuration_of("tcp://127.0.0.1:1", Path("/default")) == Path("/default")


# --- device nodes, settings, sockets


def test_device_nodes_are_read_with_their_modes_and_links(tmp_path):
    (tmp_path / "char").mkdir()
    for name, minor, mode in (("nvidia0", 0, 0o666), ("nvidiactl", 255, 0o660)):
        os.mknod(tmp_path / name, stat.S_IFCHR | mode, os.makedev(195, minor))
        (tmp_path / name).chmod(mode)
    (tmp_path / "char/195:0").symlink_to("../nvidia0")
    (tmp_path / "nvidia-caps").mkdir()
    found = {node.path: node for node in doctor._nodes(tmp_path)}
    assert set(found) == {"/dev/nvidia0", "/dev/nvidiactl"}
    assert (found["/dev/nvidia0"].mode, found["/dev/nvidia0"].linked) == (0o666, True)
    assert (found["/dev/nvidiactl"].mode, found["/dev/nvidiactl"].linked) == (0o660, False)
    assert found["/dev/nvidiactl"].group == "root"


def test_settings_that_are_wrong_are_an_error_and_their_runtime_is_looked_for(environment, tmp_path):
    (tmp_path / "server.yaml").write_text("runtime: gpu\n")
    facts = facts_with(environment, tmp_path)
    assert facts.runtime == "gpu"
    assert any("no runtime 'gpu'" in item.message for item in checkup.findings(facts))
    (tmp_path / "server.yaml").write_text("runtimes: [gpu]\n")
    facts = facts_with(environment, tmp_path)
    assert facts.server.installed
    assert any(item.area == "server" and "runtimes" in item.message for item in checkup.findings(facts))


def test_a_server_is_knocked_at_without_waiting(tmp_path):
    path = tmp_path / "s.sock"
    assert doctor._knock(path)[0] == "no"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert doctor._knock(path)[0] == "no"  # bound, but nobody listens
        listener.listen(0)
        assert doctor._knock(path)[:3] == ("yes", os.getpid(), os.getuid())
        waiting = []
        try:
            while True:  # until the queue of the listener, who takes nobody, is full
                waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                waiting[-1].connect(str(path))
        except BlockingIOError:
            began = time.monotonic()
            assert doctor._knock(path)[0] == "silent"
            assert time.monotonic() - began < 5
        finally:
            for connection in waiting:
                connection.close()
    assert doctor._knock(path)[0] == "no"


def test_a_bad_address_of_a_server_is_told(environment):
    areas, _ = examined({**environment, "GPUJOBS_HOST": "tcp://x"})
    assert any(item["level"] == "error" and "tcp://x" in item["message"] for item in areas["server"])


# --- disk and ledger


def test_the_disk_of_a_directory_that_is_not_there_is_its_parents(tmp_path):
    disk = doctor._disk(tmp_path / "a/b/c")
    here = os.statvfs(tmp_path)
    assert disk.total == here.f_blocks * here.f_frsize
    assert disk.kind


def ledger_at(directory):
    directory.mkdir(mode=0o700)
    connection = sqlite3.connect(directory / "state.sqlite", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    migrate(connection)
    connection.execute("INSERT INTO meta (name, value) VALUES ('server', 'abc')")
    return connection


def test_a_ledger_is_whole_open_closed_or_left_by_a_crash_and_nothing_is_written_beside_it(tmp_path):
    def files(directory):
        return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.endswith("-shm")}

    live = tmp_path / "live"
    connection = ledger_at(live)
    assert ledgercheck.check(live / "state.sqlite") == ("ok", "")  # in use

    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for name in ("state.sqlite", "state.sqlite-wal"):
        (crashed / name).write_bytes((live / name).read_bytes())
    before = files(crashed)
    assert ledgercheck.check(crashed / "state.sqlite") == ("ok", "")
    assert files(crashed) == before

    connection.close()
    before = files(live)
    assert set(before) == {"state.sqlite"}
    assert ledgercheck.check(live / "state.sqlite") == ("ok", "")
    assert files(live) == before


def test_a_damaged_a_foreign_and_a_newer_ledger_are_told(tmp_path):
    ledger_at(tmp_path / "s").close()
    path = tmp_path / "s/state.sqlite"
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[4096 : 4096 + 2000] = b"\xa5" * 2000
    path.write_bytes(middle)
    assert ledgercheck.check(path)[0] == "damaged"
    path.write_bytes(b"this is a letter, not a database" * 200)
    assert ledgercheck.check(path)[0] == "damaged"
    path.write_bytes(whole)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=9999")
    connection.close()
    assert ledgercheck.check(path)[0] == "newer"
    path.write_bytes(b"")
    assert ledgercheck.check(path) == ("absent", "")


def test_the_whole_command_finds_a_damaged_ledger_and_an_open_state_directory(environment, tmp_path):
    state = tmp_path / "state"
    ledger_at(state).close()
    areas, _ = examined(environment)
    assert [item["level"] for item in areas["state"]] == ["ok"]
    state.chmod(0o755)
    (state / "state.sqlite").write_bytes(b"x" * 10_000)
    areas, code = examined(environment)
    assert code == 3
    assert {item["level"] for item in areas["state"]} == {"error"}
    assert any("damaged" in item["message"] for item in areas["state"])
    assert any("mode 0755" in item["message"] for item in areas["state"])


def test_a_server_that_ended_without_being_stopped_is_told(environment, tmp_path):
    from gpujobs.adapters.enginelock import boot_id

    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    record = {"pid": 2**22 + 1, "clean": False, "boot": boot_id()}
    (state / "server.json").write_text(json.dumps(record))
    areas, _ = examined(environment)
    assert any("without being stopped" in item["message"] for item in areas["state"])
    for content in (json.dumps({**record, "pid": os.getpid()}), json.dumps({**record, "clean": True}), "[", "[]"):
        (state / "server.json").write_text(content)
        assert not doctor._unclean(state)
