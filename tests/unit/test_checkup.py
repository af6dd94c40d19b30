"""The check of a machine: each finding from its facts, versions and holes, and what a config.toml can say."""

# ruff: noqa: E501 - in the table of faults a case reads best as a line or two

from __future__ import annotations

from dataclasses import replace

import pytest

from gpujobs.core import checkup, codec, holes, toolkit
from gpujobs.core.checkup import GIB, findings
from gpujobs.core.facts import (
    AccessFacts,
    ConfigFile,
    Disk,
    EngineFacts,
    Facts,
    Node,
    NvmlFacts,
    Program,
    ServerFacts,
    StateFacts,
)
from gpujobs.core.finding import WORST_FIRST, Finding, Level, Report
from gpujobs.core.toolkit import ToolkitConfig

ENGINE = EngineFacts(
    host="unix:///var/run/docker.sock",
    version="29.4.0",
    api="1.52",
    runtimes=(("nvidia", "/usr/bin/nvidia-container-runtime"), ("runc", "runc")),
    runc="1.3.4",
    cgroup=2,
    driver="cgroupfs",
    root="/var/lib/docker",
)
NODES = tuple(
    Node(path=f"/dev/{name}", mode=0o660, uid=0, group="gpu")
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm")
)
DISK = Disk(path="/var/lib/gpujobs", kind="ext4", free=500 * GIB, total=900 * GIB, inodes=10**7)
STATE = StateFacts(path="/var/lib/gpujobs", disk=DISK, sqlite="3.46.1", mode=0o700, uid=0, ledger="ok")
NVML = NvmlFacts(driver="575.57.08", cuda="12.9", library="575.57.08", gpus=2, minors=(0, 1))
ROOT = AccessFacts(uid=0, name="root", members=("alice", "bob"))
ALICE = AccessFacts(uid=1000, name="alice", groups=("alice", "gpujobs", "gpu"), members=("alice",))
SERVER = ServerFacts(address="unix:///run/gpujobs/gpujobs.sock", installed=True, answer="yes", pid=7, uid=0, mode=0o660)
WELL = Facts(
    access=ROOT,
    server=SERVER,
    state=STATE,
    nvml=NVML,
    engine=ENGINE,
    engine_disk=Disk(path="/var/lib/docker", kind="ext4", free=500 * GIB, total=900 * GIB),
    programs=(
        Program(name="toolkit", version="1.19.1", origin="/usr/bin/nvidia-ctk"),
        Program(name="runc", version="1.3.4", origin="the Engine's"),
    ),
    toolkit_config=ConfigFile(path="/etc/nvidia-container-runtime/config.toml", config=ToolkitConfig()),
    kernel_module="575.57.08",
    nodes=NODES,
    release="6.8.0",
)


def bad(facts: Facts, area: str | None = None) -> list[Finding]:
    return [item for item in findings(facts) if item.level is not Level.OK and area in (None, item.area)]


def only(facts: Facts, area: str) -> Finding:
    found = bad(facts, area)
    assert len(found) == 1, found
    return found[0]


def test_a_machine_that_is_well_has_one_ok_at_least_for_each_area_and_nothing_else():
    found = findings(WELL)
    assert bad(WELL) == []
    assert {item.area for item in found} == set(checkup.AREAS)


def test_findings_come_area_by_area_and_the_worst_first():
    sick = replace(
        WELL, engine=replace(ENGINE, authorization=("opa",), version="24.0.1", seccomp=False),
        nvml=replace(NVML, lost=(1,)), init="the container init is not built",
    )  # fmt: skip
    found = findings(sick)
    keys = [(checkup.AREAS.index(item.area), WORST_FIRST.index(item.level)) for item in found]
    assert keys == sorted(keys)
    assert [item.level for item in found if item.area == "engine"] == ["error", "warning", "warning", "ok"]


def test_every_finding_that_is_bad_says_what_to_do_unless_it_is_a_gap():
    for facts, *_ in CASES:
        for item in bad(facts):
            gap = any(word in item.message for word in ("not looked at", "not known"))
            assert item.hint or gap, item


CASES = [
    # facts, area, level, a part of the message, a part of the hint
    (replace(WELL, engine=None, engine_problem="it does not answer", engine_hint="Start it."), "engine", "error",
     "it does not answer", "Start it."),
    (replace(WELL, engine=replace(ENGINE, version="20.10.8")), "engine", "error", "CVE-2021-41091", "20.10.9 or newer"),
    (replace(WELL, engine=replace(ENGINE, version="25.0.1")), "engine", "warning", "CVE-2024-24557", "24.0.9, 25.0.2"),
    (replace(WELL, engine=replace(ENGINE, version="27.1.0", authorization=("opa",))), "engine", "error",
     "CVE-2024-41110", "29.3.1 or newer"),
    (replace(WELL, engine=replace(ENGINE, host="tcp://10.0.0.1:2375")), "engine", "warning", "over the network", "unix"),
    (replace(WELL, engine=replace(ENGINE, rootless=True)), "engine", "warning", "without root", "as root"),
    (replace(WELL, engine=replace(ENGINE, user_namespaces=True)), "engine", "warning", "userns-remap", "daemon.json"),
    (replace(WELL, engine=replace(ENGINE, seccomp=False)), "engine", "warning", "seccomp", "daemon.json"),
    (replace(WELL, engine=replace(ENGINE, lacks=("memory",))), "engine", "warning", "limits of memory", "at boot"),
    (replace(WELL, engine=replace(ENGINE, runtimes=(("runc", "runc"),))), "runtime", "error", "no runtime 'nvidia'",
     "nvidia-ctk runtime configure"),
    (replace(WELL, runtime="gpu"), "runtime", "error", "no runtime 'gpu'", "nvidia-ctk"),
    (replace(WELL, engine=replace(ENGINE, runtimes=(("nvidia", "/opt/x"),))), "runtime", "warning", "/opt/x", "meant"),
    (replace(WELL, engine=replace(ENGINE, default_runtime="nvidia")), "runtime", "warning", "default runtime",
     "default-runtime"),
    (replace(WELL, programs=WELL.programs[1:]), "toolkit", "warning", "not known", "nvidia-container-toolkit"),
    (replace(WELL, programs=(Program(name="toolkit", version="1.17.7"), WELL.programs[1])), "toolkit", "error",
     "CVE-2025-23266", "1.17.8 or newer"),
    (replace(WELL, programs=(Program(name="toolkit", version="1.19.0"), WELL.programs[1])), "toolkit", "warning",
     "CVE-2026-24260", "1.19.1 or newer"),
    (replace(WELL, programs=(Program(name="toolkit", origin="/x/nvidia-ctk", problem="it gave no answer in 5 s"),
                             WELL.programs[1])), "toolkit", "warning", "no answer in 5 s", ""),
    (replace(WELL, toolkit_config=ConfigFile(path="/c", unreadable="cannot be read: Permission denied")), "toolkit",
     "warning", "/c cannot be read", "as root"),
    (replace(WELL, toolkit_config=ConfigFile(path="/c", broken="is no TOML: x")), "toolkit", "error",
     "no container under the runtime starts", "nvidia-ctk config"),
    (replace(WELL, programs=(WELL.programs[0], Program(name="runc", version="1.1.11"))), "runc", "error",
     "CVE-2024-21626", "1.1.12 or newer"),
    (replace(WELL, programs=(WELL.programs[0], Program(name="runc", version="1.2.7"))), "runc", "warning",
     "CVE-2025-31133", "1.2.8, 1.3.3, 1.4.0-rc.3 or newer"),
    (replace(WELL, programs=WELL.programs[:1]), "runc", "warning", "not known", ""),
    (replace(WELL, nvml=NvmlFacts(code=18, problem="x")), "driver", "error", "differ in version", "Reboot"),
    (replace(WELL, kernel_module="570.1.2"), "driver", "error", "kernel module 570.1.2, library 575.57.08", "rmmod"),
    (replace(WELL, nvml=NvmlFacts(code=None, problem="NVML crashed or gave no answer")), "driver", "error", "crashed",
     "dmesg"),
    (replace(WELL, nvml=NvmlFacts(code=12, problem="x"), kernel_module=""), "driver", "error", "no NVIDIA driver",
     "Install the NVIDIA driver"),
    (replace(WELL, nvml=NvmlFacts(code=12, problem="not found")), "driver", "error", "not found", "libnvidia-ml1"),
    (replace(WELL, nvml=NvmlFacts(code=9, problem="The kernel driver is not loaded.")), "driver", "error",
     "not loaded", "nvidia-smi"),
    (replace(WELL, nvml=replace(NVML, gpus=0, minors=())), "driver", "error", "sees no GPU", "lspci"),
    (replace(WELL, nvml=replace(NVML, lost=(1,))), "driver", "error", "GPU 1 does not answer", "Xid 79"),
    (replace(WELL, nodes=NODES[1:]), "devices", "error", "/dev/nvidia0 is missing", "nvidia-modprobe"),
    (replace(WELL, nodes=NODES[:3]), "devices", "warning", "/dev/nvidia-uvm is missing", "nvidia-modprobe -u"),
    (replace(WELL, nodes=tuple(replace(node, mode=0o666) for node in NODES)), "devices", "warning", "mode 0666",
     "gpujobs-shells.conf"),
    (replace(WELL, access=replace(ALICE, groups=("alice", "gpujobs"))), "devices", "error", "alice may not open",
     "usermod -aG gpu alice"),
    (replace(WELL, engine=replace(ENGINE, driver="systemd")), "cgroup", "warning", "daemon-reload",
     "native.cgroupdriver=cgroupfs"),
    (replace(WELL, state=replace(STATE, disk=replace(DISK, free=GIB // 2))), "disk", "error", "0.5 GiB of", "GPUJOBS_STATE"),
    (replace(WELL, state=replace(STATE, disk=replace(DISK, free=3 * GIB))), "disk", "warning", "3.0 GiB of", "Free some"),
    (replace(WELL, engine_disk=replace(DISK, free=GIB)), "disk", "error", "the Engine's data", "docker image prune"),
    (replace(WELL, engine_disk=replace(DISK, inodes=3)), "disk", "warning", "3 inodes", "small files"),
    (replace(WELL, engine_disk=Disk(path="/d", problem="no answer in 3 s")), "disk", "warning", "no answer in 3 s", ""),
    (replace(WELL, state=replace(STATE, disk=replace(DISK, kind="nfs4"))), "state", "error", "network file system (nfs4)",
     "GPUJOBS_STATE"),
    (replace(WELL, state=replace(STATE, disk=replace(DISK, kind="fuse.sshfs"))), "state", "error", "fuse.sshfs", "local"),
    (replace(WELL, state=replace(STATE, sqlite="3.34.1")), "state", "error", "SQLite 3.34.1 is too old", "newer Python"),
    (replace(WELL, state=replace(STATE, mode=0o755)), "state", "error", "mode 0755", "chmod 0700"),
    (replace(WELL, state=replace(STATE, uid=5)), "state", "warning", "uid 5", "that account"),
    (replace(WELL, state=replace(STATE, unclean=True)), "state", "warning", "without being stopped", "server.log"),
    (replace(WELL, state=replace(STATE, ledger="damaged", problem="row 3 missing")), "state", "error", "row 3 missing",
     "backup"),
    (replace(WELL, state=replace(STATE, ledger="newer", problem="schema 9")), "state", "error", "newer gpujobs", "version"),
    (replace(WELL, state=replace(STATE, ledger="unknown", problem="locked")), "state", "warning", "locked", ""),
    (replace(WELL, access=replace(ROOT, docker_socket="/d.sock", docker_mode=0o666)), "access", "error",
     "any account may write to /d.sock", "chmod 0660"),
    (replace(WELL, access=replace(ROOT, members=None)), "access", "warning", "no group gpujobs", "groupadd"),
    (replace(WELL, access=replace(ALICE, groups=("alice", "gpu"))), "access", "error", "not in the group gpujobs",
     "usermod -aG gpujobs alice"),
    (replace(WELL, server=replace(SERVER, settings="the settings are not valid")), "server", "error", "settings", "Mend"),
    (replace(WELL, server=replace(SERVER, uid=66)), "server", "error", "uid 66", "Do not use it"),
    (replace(WELL, server=replace(SERVER, mode=0o666)), "server", "error", "open to all", "0660"),
    (replace(WELL, server=replace(SERVER, answer="no")), "server", "error", "does not answer", "systemctl"),
    (replace(WELL, server=replace(SERVER, answer="silent")), "server", "error", "no connection in time", "restart"),
    (replace(WELL, access=ALICE, server=replace(SERVER, answer="forbidden")), "server", "error", "alice may not use",
     "group gpujobs"),
    (replace(WELL, init="the container init does not run: x"), "init", "error", "does not run", "gcc"),
    (replace(WELL, missing_calls=("mount_setattr",)), "kernel", "error", "lacks mount_setattr", "5.12"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "area", "level", "message", "hint"), CASES, ids=[f"{case[1]}-{case[3][:30]}" for case in CASES]
)
def test_each_fault_is_found_with_what_to_do(facts, area, level, message, hint):
    found = [item for item in bad(facts, area) if message in item.message]
    assert len(found) == 1, bad(facts)
    assert found[0].level == level
    assert hint in found[0].hint


def test_the_exit_code_is_0_without_an_error_3_with_one_and_4_without_an_engine():
    warned = (Finding("disk", Level.WARNING, "x", "y"),)
    wrong = (Finding("disk", Level.ERROR, "x", "y"),)
    assert (Report(warned, engine_answers=True).exit, Report(warned, engine_answers=True).ok) == (0, True)
    assert (Report(wrong, engine_answers=True).exit, Report(wrong, engine_answers=True).ok) == (3, False)
    assert Report(wrong, engine_answers=False).exit == 4


def test_an_account_that_the_systems_server_serves_needs_no_engine_and_is_not_frightened_by_it():
    facts = replace(WELL, access=ALICE, engine=None, engine_problem="may not use Docker")
    facts = replace(facts, engine_disk=None, state=replace(STATE, uid=ALICE.uid))
    assert checkup.is_served(facts)
    assert bad(facts) == []
    assert not checkup.is_served(replace(facts, server=replace(SERVER, uid=1000)))


def test_links_in_dev_char_keep_gpus_under_the_systemd_driver():
    linked = tuple(replace(node, linked=True) for node in NODES)
    facts = replace(WELL, engine=replace(ENGINE, driver="systemd"), nodes=linked)
    assert bad(facts, "cgroup") == []
    assert bad(replace(facts, nodes=(*linked[:-1], NODES[-1])), "cgroup")


def test_members_of_the_docker_group_are_told_as_root():
    facts = replace(WELL, access=replace(ROOT, docker_group="docker", docker_members=tuple("abcdefg")))
    found = [item for item in findings(facts) if "may use Docker directly" in item.message]
    assert [item.level for item in found] == [Level.OK]
    assert "a, b, c, d, e and 2 more" in found[0].message


def test_facts_go_through_json_and_back():
    # Some of them are gathered in a child process.
    assert codec.decode(Facts, codec.encode(WELL)) == WELL


# --- versions and holes


VERSIONS = [
    ("NVIDIA Container Toolkit CLI version 1.17.8\ncommit: f202b80", (1, 17, 8, holes.RELEASED)),
    ("runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1+deb12u1", (1, 1, 5, holes.RELEASED)),
    ("v1.4.0-rc.3", (1, 4, 0, 3)),
    ("1.0.0~rc93+ds1", (1, 0, 0, 93)),
    ("1.0-rc6", (1, 0, 0, 6)),
    ("19.03.15", (19, 3, 15, holes.RELEASED)),
    ("29.4.0+azure-1", (29, 4, 0, holes.RELEASED)),
    ("dev", None),
    ("", None),
    ("7", None),
    ("9" * 5000 + "." + "9" * 5000, None),
]


@pytest.mark.parametrize(("text", "version"), VERSIONS, ids=[text[:24] for text, _ in VERSIONS])
def test_the_first_version_in_a_text_is_read(text, version):
    assert holes.version_of(text) == version


HOLES = [
    (holes.TOOLKIT, "1.14.3", {"CVE-2026-24260", "CVE-2025-23266", "CVE-2025-23267", "CVE-2025-23359", "CVE-2024-0135",
                               "CVE-2024-0132"}),
    (holes.TOOLKIT, "1.16.2", {"CVE-2026-24260", "CVE-2025-23266", "CVE-2025-23267", "CVE-2025-23359",
                               "CVE-2024-0135"}),
    (holes.TOOLKIT, "1.17.4", {"CVE-2026-24260", "CVE-2025-23266", "CVE-2025-23267"}),
    (holes.TOOLKIT, "1.17.7", {"CVE-2026-24260", "CVE-2025-23266", "CVE-2025-23267"}),
    (holes.TOOLKIT, "1.17.8", {"CVE-2026-24260"}),
    (holes.TOOLKIT, "1.19.1", set()),
    (holes.RUNC, "1.1.11", {"CVE-2024-21626", "CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"}),
    (holes.RUNC, "1.1.12", {"CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"}),
    (holes.RUNC, "1.2.7", {"CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"}),
    (holes.RUNC, "1.2.8", set()),
    (holes.RUNC, "1.3.0", {"CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"}),
    (holes.RUNC, "1.3.3", set()),
    (holes.RUNC, "1.4.0-rc.2", {"CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"}),
    (holes.RUNC, "1.4.0-rc.3", set()),
    (holes.RUNC, "1.5.0", set()),
    (holes.RUNC, "1.0.0-rc2", {"CVE-2024-21626", "CVE-2025-31133", "CVE-2025-52881"}),
    (holes.ENGINE, "20.10.24+dfsg1", {"CVE-2024-24557"}),
    (holes.ENGINE, "24.0.9", set()),
    (holes.ENGINE, "28.0.0", set()),
    (holes.ENGINE, "not told", set()),
]  # fmt: skip


@pytest.mark.parametrize(("known", "version", "expected"), HOLES, ids=[f"{k[0].cve}-{v}" for k, v, _ in HOLES])
def test_the_holes_of_a_version_go_by_its_release_line(known, version, expected):
    assert {hole.cve for hole in holes.holes(known, version)} == expected


def test_holes_of_the_authorization_plugin_need_such_a_plugin():
    found = {hole.cve for hole in holes.holes(holes.ENGINE, "25.0.6", authorization=True)}
    assert found == {"CVE-2026-34040"}
    assert {hole.cve for hole in holes.holes(holes.ENGINE, "25.0.5", authorization=True)} == {
        "CVE-2024-41110", "CVE-2026-34040",
    }  # fmt: skip


def test_what_a_distribution_has_mended_under_an_old_number_is_no_hole():
    mended = Program(name="runc", version="1.1.5+ds1", origin="the Engine's", mended=("CVE-2024-21626",))
    facts = replace(WELL, programs=(WELL.programs[0], mended))
    found = only(facts, "runc")
    assert found.level is Level.WARNING
    assert "CVE-2024-21626" not in found.message
    assert "Your distribution may mend them" in found.hint
    every = tuple(hole.cve for hole in holes.RUNC)
    facts = replace(WELL, programs=(WELL.programs[0], replace(mended, mended=every)))
    assert bad(facts, "runc") == []
    assert any("its distribution has mended" in item.message for item in findings(facts))


# --- config.toml

EVERY = """
accept-nvidia-visible-devices-envvar-when-unprivileged = false
accept-nvidia-visible-devices-as-volume-mounts = true
swarm-resource = "DOCKER_RESOURCE_GPU"
disable-require = true
supported-driver-capabilities = "graphics,video"
[nvidia-container-cli]
no-cgroups = true
ldconfig = "/sbin/ldconfig"
[nvidia-container-runtime]
mode = "legacy"
[nvidia-container-runtime.modes.cdi]
spec-dirs = ["/srv/cdi"]
"""


def said(text: str | bytes, version: str = "1.17.8", specifications: tuple[str, ...] = (), **more: bool):
    parsed = toolkit.parse(text.encode() if isinstance(text, str) else text)
    assert isinstance(parsed, ToolkitConfig), parsed
    return [
        (item.level.value, item.message) for item in toolkit.findings("/c", parsed, version, specifications, **more)
    ]


def test_every_key_is_read():
    assert toolkit.parse(EVERY.encode()) == ToolkitConfig(
        accept_envvar=False,
        accept_mounts=True,
        swarm_resource="DOCKER_RESOURCE_GPU",
        disable_require=True,
        capabilities="graphics,video",
        no_cgroups=True,
        ldconfig="/sbin/ldconfig",
        mode="legacy",
        cdi_directories=("/srv/cdi",),
    )
    assert [level for level, _ in said(EVERY)] == ["error", "error", "error", "warning", "warning", "error", "error"]


TOML = [
    ("", None, ""),
    ("[nvidia-container-runtime]\nmode = 'auto'\n", None, ""),
    ("accept-nvidia-visible-devices-envvar-when-unprivileged = false", "error", "silently gives jobs no GPU"),
    ("swarm-resource = 'X'", "error", "takes the place of NVIDIA_VISIBLE_DEVICES"),
    ("swarm-resource = ''", None, ""),
    ("supported-driver-capabilities = 'utility'", "error", "lacks compute"),
    ("supported-driver-capabilities = 'compat32,compute,display,graphics,ngx,utility,video'", None, ""),
    ("accept-nvidia-visible-devices-as-volume-mounts = true", "warning", "past the variable"),
    ("disable-require = true", "warning", "too new for the driver"),
    ("[nvidia-container-cli]\nldconfig = '/sbin/ldconfig'", "error", "CVE-2024-0136"),
    ("[nvidia-container-cli]\nldconfig = '@/sbin/ldconfig.real'", None, ""),
    ("[nvidia-container-runtime]\nmode = 'cdi'", "error", "no GPU can be resolved"),
    ("[nvidia-container-runtime]\nmode = 'csv'", "warning", "Tegra"),
    ("[nvidia-container-runtime]\nmode = 'magic'", "error", "'magic' is unknown"),
    ("swarm-resource = 5", "error", "swarm-resource must be a text"),
    ("disable-require = 'no'", "error", "disable-require must be true or false"),
    ("nvidia-container-runtime = 3", "error", "nvidia-container-runtime must be a table"),
    ("[nvidia-container-runtime]\nmodes = []", "error", "modes must be a table"),
    ("[nvidia-container-runtime.modes.cdi]\nspec-dirs = [1]", "error", "spec-dirs must be a list"),
]


@pytest.mark.parametrize(("text", "level", "message"), TOML, ids=[text[:50] for text, *_ in TOML])
def test_each_setting_of_the_toolkit_that_matters_is_told(text, level, message):
    found = said(text)
    assert [item[0] for item in found] == ([] if level is None else [level])
    assert level is None or message in found[0][1]


def test_cdi_with_a_specification_is_well():
    assert said("[nvidia-container-runtime]\nmode = 'cdi'", specifications=("/etc/cdi/nvidia.yaml",)) == []


@pytest.mark.parametrize(
    ("mode", "version", "rootless", "level"),
    [
        ("legacy", "1.19.1", False, "error"),
        ("auto", "1.17.8", False, "error"),
        ("auto", "1.18.0", False, None),  # auto is CDI from here on
        ("auto", "", False, "warning"),
        ("jit-cdi", "1.18.0", False, None),
        ("legacy", "1.17.8", True, None),
    ],
)
def test_no_cgroups_matters_in_the_legacy_mode_of_an_engine_of_root(mode, version, rootless, level):
    text = f"[nvidia-container-cli]\nno-cgroups = true\n[nvidia-container-runtime]\nmode = '{mode}'"
    found = said(text, version, rootless=rootless)
    assert [item[0] for item in found] == ([] if level is None else [level])


HOSTILE = [
    (b"\xff\xfe", "is not UTF-8"),
    (b"a = " + b"[" * 100_000, "is nested too deeply"),
    (b"a = " + b"9" * 10_000, "is no TOML"),
    (b"a = 1\na = 2", "is no TOML"),
    (b"[nvidia-container-cli", "is no TOML"),
    (b"a = 1\0", "is no TOML"),
    ("\u202egnp = 1".encode(), "is no TOML"),
    (b"<html>502 Bad Gateway</html>", "is no TOML"),
]


@pytest.mark.parametrize(
    ("content", "problem"), HOSTILE, ids=[problem + str(n) for n, (_, problem) in enumerate(HOSTILE)]
)
def test_a_file_that_the_runtime_cannot_read_is_told_and_never_raises(content, problem):
    found = toolkit.parse(content)
    assert isinstance(found, str)
    assert found.startswith(problem)
    assert len(found) < 300
