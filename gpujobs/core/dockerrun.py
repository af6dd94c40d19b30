"""The command line of ``docker run``, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from gpujobs.core.errors import InvalidInput
from gpujobs.core.shellwords import DOLLAR, raw
from gpujobs.core.values import did_you_mean, shown

SHORT = {
    "a": "attach", "c": "cpu-shares", "d": "detach", "e": "env", "h": "hostname", "i": "interactive", "l": "label",
    "m": "memory", "P": "publish-all", "p": "publish", "q": "quiet", "t": "tty", "u": "user", "v": "volume",
    "w": "workdir",
}  # fmt: skip
FLAGS = frozenset({
    "detach", "disable-content-trust", "init", "interactive", "no-healthcheck", "oom-kill-disable", "privileged",
    "publish-all", "quiet", "read-only", "rm", "sig-proxy", "tty", "use-api-socket",
})  # fmt: skip
"""Options without a value (docker/cli, cli/command/container/opts.go)."""
VALUED = frozenset({
    "add-host", "annotation", "attach", "blkio-weight", "blkio-weight-device", "cap-add", "cap-drop", "cgroup-parent",
    "cgroupns", "cidfile", "cpu-count", "cpu-percent", "cpu-period", "cpu-quota", "cpu-rt-period", "cpu-rt-runtime",
    "cpu-shares", "cpus", "cpuset-cpus", "cpuset-mems", "detach-keys", "device", "device-cgroup-rule",
    "device-read-bps", "device-read-iops", "device-write-bps", "device-write-iops", "dns", "dns-opt", "dns-option",
    "dns-search", "domainname", "entrypoint", "env", "env-file", "expose", "gpus", "group-add", "health-cmd",
    "health-interval", "health-retries", "health-start-interval", "health-start-period", "health-timeout", "hostname",
    "io-maxbandwidth", "io-maxiops", "ip", "ip6", "ipc", "isolation", "kernel-memory", "label", "label-file", "link",
    "link-local-ip", "log-driver", "log-opt", "mac-address", "memory", "memory-reservation", "memory-swap",
    "memory-swappiness", "mount", "name", "net", "net-alias", "network", "network-alias", "oom-score-adj", "pid",
    "pids-limit", "platform", "publish", "pull", "restart", "runtime", "security-opt", "shm-size", "stop-signal",
    "stop-timeout", "storage-opt", "sysctl", "tmpfs", "ulimit", "user", "userns", "uts", "volume", "volume-driver",
    "volumes-from", "workdir",
})  # fmt: skip
"""Options with a value, of the same file."""

_SUDO_VALUED = frozenset({"-C", "-D", "-g", "-h", "-p", "-R", "-r", "-T", "-t", "-U", "-u", "--user", "--group"})
_GLOBAL_VALUED = frozenset({"config", "context", "host", "log-level", "tlscacert", "tlscert", "tlskey"})

WHY = {
    "rm": "the server removes ended containers by itself",
    "detach": "`gpujobs submit` returns at once, `gpujobs run` follows the job",
    "interactive": "a job has no standard input; `gpujobs exec` runs a command in it",
    "tty": "a job has no terminal; `gpujobs shell` opens one in it",
    "init": "every job has an init",
    "quiet": "it is for the image's pull",
    "privileged": "no job is privileged; GPUs come by gpus:",
    "read-only": "it is not supported; mount what has to stay as it is with :ro",
    "publish-all": "each port has to be named; write ports:",
    "user": "a job runs as the one who submits it, with their groups",
    "group-add": "a job has the groups of the one who submits it",
    "cap-drop": "a job has no capabilities anyway",
    "security-opt": "jobs have no-new-privileges and the Engine's own profiles",
    "restart": "an ended job stays ended; `gpujobs rerun` starts it again",
    "hostname": "the host's name in the container is the server's choice",
    "add-host": "names of hosts are not set; use addresses",
    "dns": "name servers are the Engine's",
    "link": "containers are not linked; a job is on a network of its own",
    "pid": "a job sees its own processes only",
    "uts": "a job has a name of its own",
    "userns": "the Engine's setting holds",
    "cgroup-parent": "the server's setting holds",
    "cidfile": "`gpujobs submit --quiet` prints the job's id",
    "log-driver": "the server keeps the logs; see `gpujobs logs`",
    "log-opt": "the server keeps the logs; see `gpujobs logs`",
    "memory-swap": "swap is the server's setting",
    "memory-reservation": "only mem_limit is kept",
    "cpu-shares": "CPUs are counted, not weighed; write cpus:",
    "cpu-period": "write cpus: instead",
    "cpu-quota": "write cpus: instead",
    "cpuset-mems": "the server chooses CPUs near the GPUs",
    "pids-limit": "the server's limit holds",
    "pull": "the server pulls what is not there",
    "platform": "the machine's own platform is used",
    "sysctl": "kernel settings cannot be changed by a job",
    "volumes-from": "name the volumes under volumes:",
    "volume-driver": "only plain local volumes are supported",
    "expose": "ports are published by ports:; inside there is nothing to open",
    "label-file": "write the labels under labels:",
    "oom-kill-disable": "a job ends when its memory limit is reached",
    "stop-timeout": "",
}
"""Why an option is left out, and what there is instead."""


@dataclass(slots=True)
class Line:
    """A command line's parts; literal dollar signs are :data:`~gpujobs.core.shellwords.DOLLAR`.

    Attributes:
        options: Long names and values in their order; a flag's value is ``true``.
        nvidia: Whether it was given to ``nvidia-docker``.
        visible: GPUs that ``NV_GPU=`` before it names.
        passed: What stood before ``run`` and why it is left out.
    """

    image: str = ""
    options: list[tuple[str, str]] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    nvidia: bool = False
    visible: str | None = None
    passed: list[tuple[str, str]] = field(default_factory=list)


def parse(words: list[str]) -> Line:
    """Takes the words of a line apart.

    Raises:
        InvalidInput: It is not ``docker run``, an option is unknown, or there is no image.
    """
    line = Line()
    words = _start(list(words), line)
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        if word == "--":
            break
        if word.startswith("--"):
            line.options.append(_long(word[2:], words))
        else:
            line.options += _short(word[1:], words)
    if not words:
        raise InvalidInput("the command line names no image", hint="Write docker run [options] IMAGE [command].")
    line.image, *line.arguments = words
    return line


def _start(words: list[str], line: Line) -> list[str]:
    while words and (words[0] in {"sudo", "exec", "time", "nohup", "$"} or words[0] == DOLLAR
                     or re.match(r"[A-Za-z_][A-Za-z0-9_]*=", words[0])):  # fmt: skip
        first = words.pop(0)
        if first == "sudo":
            while words and words[0].startswith("-"):
                word = words.pop(0)
                if word in _SUDO_VALUED and words:
                    words.pop(0)
            line.passed.append(("sudo", "a job runs as the one who submits it"))
        elif first.startswith("NV_GPU="):
            line.visible = first.partition("=")[2]
    program = words.pop(0).rpartition("/")[2] if words else ""
    if program == "nvidia-docker":
        line.nvidia = True
    elif program not in {"docker", "podman"}:
        raise InvalidInput(f"{shown(raw(program))} is not docker", hint="Write docker run [options] IMAGE [command].")
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if "=" not in word and word.lstrip("-") in _GLOBAL_VALUED | {"H", "c", "l"} and words:
            words.pop(0)
        line.passed.append((word, "the job goes to the gpujobs server; see GPUJOBS_HOST"))
    if words and words[0] == "container":
        words.pop(0)
    if not words or words[0] not in {"run", "create"}:
        verb = shown(raw(words[0])) if words else "nothing"
        raise InvalidInput(f"only docker run can be translated; the line has {verb}")
    return words[1:]


def _long(word: str, words: list[str]) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if name in FLAGS:
        return name, value if equals else "true"
    if name not in VALUED:
        near = did_you_mean(name, sorted(FLAGS | VALUED)).replace("`", "`--", 1)
        raise InvalidInput(f"docker run has no option --{shown(raw(name))[1:-1]}{near}")
    if not equals:
        if not words:
            raise InvalidInput(f"option --{name} has no value")
        value = words.pop(0)
    return name, value


def _short(letters: str, words: list[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    while letters:
        letter, letters = letters[0], letters[1:]
        name = SHORT.get(letter)
        if name is None:
            raise InvalidInput(f"docker run has no option -{shown(letter)[1:-1]}")
        if name in FLAGS:
            found.append((name, "true"))
            continue
        if letters:
            found.append((name, letters.removeprefix("=")))
        elif words:
            found.append((name, words.pop(0)))
        else:
            raise InvalidInput(f"option -{letter} has no value")
        break
    return found
