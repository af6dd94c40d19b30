"""What is said about keys that are missing or unknown, with what people from elsewhere may have meant."""

from __future__ import annotations

from gpujobs.core.spec import KEYS, SUPPORTED
from gpujobs.core.values import Loc, did_you_mean, unknown_key

HABITS = {
    **dict.fromkeys(
        ("gpu", "num_gpus", "ngpus", "n_gpus", "gres", "gpus_per_node", "devices", "device", "deploy"), "gpus"
    ),
    **dict.fromkeys(("memory", "mem", "memory_limit", "mem_per_node"), "mem_limit"),
    **dict.fromkeys(("shm", "shmsize"), "shm_size"),
    **dict.fromkeys(("env", "envs", "variables"), "environment"),
    **dict.fromkeys(("workdir", "cwd", "chdir", "workingdir"), "working_dir"),
    **dict.fromkeys(("volume", "mount", "mounts", "bind"), "volumes"),
    **dict.fromkeys(("time", "timeout", "walltime", "timelimit"), "time_limit"),
    **dict.fromkeys(("cmd", "args", "script", "run", "exec"), "command"),
    **dict.fromkeys(("cpu", "ncpus", "cpus_per_task", "num_cpus", "cpu_count"), "cpus"),
    **dict.fromkeys(("job_name", "container_name", "jobname", "title"), "name"),
    **dict.fromkeys(("port", "publish", "expose"), "ports"),
    **dict.fromkeys(("ulimit", "limits"), "ulimits"),
    **dict.fromkeys(("health_check", "health"), "healthcheck"),
    **dict.fromkeys(("array", "sweep", "strategy"), "matrix"),
    "container": "image", "dockerfile": "build", "label": "labels", "net": "network_mode",
    "network": "network_mode",
    "restart": "retries", "dependency": "depends_on", "after": "depends_on",
}  # fmt: skip
"""What people write who come from Docker, Compose or a cluster."""

_REASONS = {
    "services": "a job file is one job; write one service's keys at the top level",
    "version": "it has no meaning here; leave it out",
    "user": "a job runs as the one who submits it; leave it out",
    "privileged": "no job is privileged; leave it out",
    "tty": "jobs have no terminal; leave it out",
    "stdin_open": "jobs have no standard input; leave it out",
}


def no_such_key(key: str) -> str:
    """The sentence for a key that the file does not have."""
    if key in _REASONS:
        return f"unknown key: {_REASONS[key]}"
    choices = [name for name in KEYS if name in SUPPORTED]
    near = did_you_mean(key, choices, HABITS)
    # The list is long: it is shown only where nothing better can be said.
    return f"unknown key{near}" if near else unknown_key(key, choices)


MISSING = {
    "context": "write the directory to build from, such as `context: .`",
    "test": "write the command, such as `test: curl -f localhost:8080`",
}
_NESTED: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "gpus": (
        ("count", "memory", "model", "capability", "link", "mig", "share", "uuid"),
        {
            **dict.fromkeys(("gpu", "number", "n", "num"), "count"),
            **dict.fromkeys(("mem", "vram"), "memory"),
            **dict.fromkeys(("name", "type", "models"), "model"),
            **dict.fromkeys(("uuids", "ids", "device_ids", "devices", "index", "indices"), "uuid"),
            **dict.fromkeys(("nvlink", "topology"), "link"),
            **dict.fromkeys(("compute", "capabilities"), "capability"),
            "profile": "mig",
        },
    ),
    "build": (
        ("context", "dockerfile", "args", "target", "labels", "no_cache"),
        {"path": "context", "file": "dockerfile"},
    ),
    "healthcheck": (
        ("test", "interval", "timeout", "retries", "start_period", "disable"),
        {"cmd": "test", "command": "test"},
    ),
}


def unknown(loc: Loc) -> str:
    """The sentence for a key that its mapping does not have."""
    key = str(loc[-1])
    if len(loc) == 1:
        return no_such_key(key)
    allowed, habits = _NESTED[str(loc[0])]
    return unknown_key(key, allowed, habits)
