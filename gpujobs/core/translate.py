"""From other launchers' words to a job file: ``docker run`` lines that people already have."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gpujobs.core import dockerrun, forms, gpukeys, limits, mounts, shellwords
from gpujobs.core.errors import InvalidInput
from gpujobs.core.rules import FEATURES
from gpujobs.core.shellwords import DOLLAR, raw
from gpujobs.core.values import Context, SpecError, duration, number, shown, size, text
from gpujobs.core.yamltext import document, literal

_ORDER = (
    "name", "image", "entrypoint", "command", "gpus", "cpus", "mem_limit", "shm_size", "working_dir", "volumes",
    "environment", "env_file", "ports", "ulimits", "labels", "stop_signal", "stop_grace_period", "healthcheck",
    "ipc", "network_mode",
)  # fmt: skip
"""Of the keys in what is written."""

_CONTEXT = Context(file="", directory="/", home="/", variables={})


@dataclass(frozen=True, slots=True)
class FromDocker:
    """A translated command line.

    Attributes:
        text: The job file, with the notes as comments.
        notes: For each thing that was left out or changed: what, why, what to do.
    """

    text: str
    notes: tuple[str, ...]


def from_docker(command: str | Sequence[str]) -> FromDocker:
    """Translates a ``docker run`` command line to a job file.

    Args:
        command: The line as one would type it, where variables stay variables; or its words, taken as they are.

    Raises:
        InvalidInput: It is no ``docker run`` line, or names no image.
    """
    if isinstance(command, str):
        words = shellwords.split(command)
        translation = _Translation(words.words)
        for unknown in words.unknown:
            translation.note(unknown, "it is not run here; write its result")
        if words.rest:
            translation.note(words.rest, "only one command is translated, without redirections")
    else:
        if any("\0" in word for word in command):
            raise InvalidInput("the command line contains a NUL character")
        translation = _Translation([word.replace("$", DOLLAR) for word in command])
    return translation.run()


class _Translation:
    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._notes: list[str] = []
        self._keys: dict[str, object] = {}
        self._environment: dict[str, object] = {}
        self._volumes: list[object] = []
        self._ports: list[object] = []
        self._labels: dict[str, object] = {}
        self._ulimits: dict[str, object] = {}
        self._env_files: list[object] = []
        self._health: dict[str, object] = {}
        self._gpus: str | None = None  # as --gpus has it
        self._visible: str | None = None  # as NVIDIA_VISIBLE_DEVICES has it
        self._cuda: str | None = None
        self._devices: list[str] = []  # GPUs, as --device has them
        self._runtime = False

    def note(self, what: str, why: str) -> None:
        """Says why something is not in the file."""
        cut = raw(what) if len(what) <= 80 else raw(what)[:79] + "…"
        line = f"{shown(cut, 80)[1:-1]}: {why}"
        if line not in self._notes:
            self._notes.append(line)

    def run(self) -> FromDocker:
        line = dockerrun.parse(self._words)
        self._runtime, self._visible = line.nvidia, line.visible
        for what, why in line.passed:
            self.note(what, why)
        for name, value in line.options:
            self._option(name, value)
        self._image(line.image)
        arguments = line.arguments
        if arguments:
            self._keys["command"] = [self._text(word) for word in arguments]
        self._choose_gpus()
        keys = self._assembled()
        notes = tuple(self._notes)
        head = ["From a `docker run` line by `gpujobs from-docker`."]
        if notes:
            head += ["Left out or changed:", *(f"  {note}" for note in notes)]
        return FromDocker(document(keys, head), notes)

    # ------------------------------------------------------------------------------------------ options

    def _option(self, name: str, value: str) -> None:
        handlers: dict[str, Callable[[str], None]] = {
            "env": self._env, "env-file": self._env_file,
            "volume": self._volume, "mount": self._mount, "tmpfs": self._tmpfs, "publish": self._publish,
            "label": self._label, "ulimit": self._ulimit, "name": self._name, "gpus": self._set_gpus,
            "runtime": self._set_runtime, "entrypoint": self._entrypoint, "ipc": self._ipc,
            "cpuset-cpus": self._cpuset, "net": self._network, "network": self._network, "device": self._device,
            "cap-add": self._capability,
            "no-healthcheck": lambda _: self._health.update(disable=True),
        }  # fmt: skip
        simple: dict[str, tuple[str, Callable[[object], object]]] = {
            "workdir": ("working_dir", forms.working_dir),
            "shm-size": ("shm_size", lambda word: size(word, 64 << 10)),
            "memory": ("mem_limit", lambda word: size(word, 6 << 20)),
            "cpus": ("cpus", lambda word: number(word, "a number of CPUs", "such as 8", 0.01, 4096)),
            "stop-signal": ("stop_signal", forms.signal_name),
        }
        health = {"health-cmd": "test", "health-interval": "interval", "health-timeout": "timeout",
                  "health-start-period": "start_period", "health-retries": "retries"}  # fmt: skip
        if name in dockerrun.FLAGS and value.lower() in {"false", "0"}:
            return
        if name in handlers:
            handlers[name](value)
        elif name in simple:
            key, read = simple[name]
            if self._reads(f"--{name} {value}", read, value):
                self._keys[key] = self._number(value) if key == "cpus" else self._text(value)
        elif name == "stop-timeout":
            if self._reads(f"--{name} {value}", lambda word: duration(word, 0, 86400), value):
                self._keys["stop_grace_period"] = f"{value}s" if value.isdigit() else self._text(value)
        elif name in health:
            read_health = limits.check_test if name == "health-cmd" else (
                limits.check_retries if name == "health-retries" else limits.start_period)  # fmt: skip
            if self._reads(f"--{name} {value}", read_health, value):
                self._health[health[name]] = self._number(value) if name == "health-retries" else self._text(value)
        else:
            shownvalue = "" if name in dockerrun.FLAGS else f" {value}"
            why = dockerrun.WHY.get(name) or "a job file has no such key"
            self.note(f"--{name}{shownvalue}", why)

    def _reads(self, what: str, read: Callable[[object], object], value: object) -> bool:
        """Whether the job file's own reader takes a value; notes why not. Variables cannot be known here."""
        if isinstance(value, str) and "$" in value:
            return True
        try:
            read(_each(value, raw))
        except SpecError as error:
            self.note(what, error.faults[0].message)
            return False
        return True

    def _text(self, word: str) -> str:
        """A word as a value of the file: variables stay, all else is literal."""
        parts = re.split(r"(\$\{[^{}]*\})", word)
        return "".join(part if index % 2 else literal(raw(part)) for index, part in enumerate(parts))

    def _number(self, word: str) -> object:
        return (
            int(word) if word.isdigit() else float(word) if re.fullmatch(r"[0-9]*\.[0-9]+", word) else self._text(word)
        )

    def _env(self, word: str) -> None:
        name, equals, value = word.partition("=")
        name = raw(name)
        if name == "NVIDIA_VISIBLE_DEVICES":
            self._visible = value if equals else "all"
            self.note(f"-e {word}", "GPUs are asked for with gpus:")
            return
        if name == "NVIDIA_DRIVER_CAPABILITIES":
            self._driver(f"-e {word}", value)
            return
        if name == "CUDA_VISIBLE_DEVICES":
            self._cuda = value
            self.note(f"-e {word}", "a job's GPUs are numbered from 0; it sees no others")
            return
        known = value if equals and "$" not in value else "x"
        if self._reads(f"-e {word}", lambda item: forms.environment(item, _CONTEXT), {name: known}):
            self._environment[name] = self._text(value) if equals else None

    def _env_file(self, word: str) -> None:
        if self._reads(
            f"--env-file {word}", lambda item: text(item, "a path", "a file's path, such as settings.env"), word
        ):
            self._env_files.append(self._text(word))

    def _volume(self, word: str) -> None:
        source, *rest = word.split(":")
        source = re.sub(r"^\$\{PWD\}(?=/|$)", ".", source)
        modes = rest[1].split(",") if len(rest) > 1 else []
        dropped = [mode for mode in modes if mode not in {"ro", "rw"}]
        if dropped:
            self.note(
                f"-v {word}", f"mode {', '.join(dropped)} is left out: it has no meaning here or cannot be chosen"
            )
        parts = [source, *rest[:1], *(["ro"] if "ro" in modes else []), *rest[2:]]
        if source in {"/var/run/docker.sock", "/run/docker.sock"}:
            self.note(f"-v {word}", "who reaches the Engine's socket is root; a job does not get it")
            return
        self._mounted(f"-v {word}", ":".join(parts))

    def _mounted(self, what: str, volume: str | Mapping[str, object]) -> None:
        """Keeps a volume if the file's reader takes it beside those there are."""
        everything = [*self._volumes, volume]
        known = _each(everything, lambda text: re.sub(r"\$\{[^{}]*\}", "/x", text) if text.startswith("$") else (
            re.sub(r"\$\{[^{}]*\}", "x", text)))  # fmt: skip
        if self._reads(what, lambda items: mounts.volumes(items, _CONTEXT), known):
            self._volumes.append(volume)

    def _mount(self, word: str) -> None:
        given = {}
        for part in word.strip('"').split(","):
            key, equals, value = part.strip('"').partition("=")
            given[key.strip().lower()] = value if equals else "true"
        kind = given.pop("type", "volume")
        source = re.sub(r"^\$\{PWD\}(?=/|$)", ".", given.pop("source", given.pop("src", "")))
        where = given.pop("target", given.pop("destination", given.pop("dst", "")))
        read_only = given.pop("readonly", given.pop("ro", "false")).lower() in {"true", "1"}
        amount = given.pop("tmpfs-size", "")
        for key, value in given.items():
            self.note(f"--mount {key}={value}", "it is left out: it has no meaning here or cannot be chosen")
        if kind == "tmpfs":
            self._tmpfs(f"{where}:size={amount}" if amount else where)
        elif ":" in source or ":" in where:
            long: dict[str, object] = {"type": kind, "source": source, "target": where}
            self._mounted(f"--mount {word}", {**long, **({"read_only": True} if read_only else {})})
        else:
            self._mounted(f"--mount {word}", f"{source}:{where}{':ro' if read_only else ''}")

    def _tmpfs(self, word: str) -> None:
        where, _, options = word.partition(":")
        amount = re.search(r"(?:^|,)size=([^,]+)", options)
        volume: dict[str, object] = {"type": "tmpfs", "target": where}
        if amount is not None:
            volume["tmpfs"] = {"size": amount[1]}
        self._mounted(f"--tmpfs {word}", volume)

    def _publish(self, word: str) -> None:
        if not self._reads(f"-p {word}", mounts.ports, [*self._ports, word]) and "$" not in word:
            return
        self._ports.append(int(word) if word.isdecimal() else self._text(word))
        if not re.match(r"[^:]*\.|\[", word):
            self.note(f"-p {word}", "it is published on 127.0.0.1; write 0.0.0.0: before it for all addresses")

    def _label(self, word: str) -> None:
        name, _, value = word.partition("=")
        if self._reads(f"-l {word}", lambda _: forms.labels({raw(name): ""}), ""):
            self._labels[raw(name)] = self._text(value)

    def _ulimit(self, word: str) -> None:
        name, _, value = word.partition("=")
        soft, colon, hard = value.partition(":")
        limit: object = {"soft": self._number(soft), "hard": self._number(hard)} if colon and soft != hard else soft
        if self._reads(f"--ulimit {word}", limits.ulimits, {name: limit}):
            self._ulimits[name] = int(soft) if isinstance(limit, str) and re.fullmatch(r"-?\d+", soft) else limit

    def _name(self, word: str) -> None:
        self._keys["name"] = self._text(word) if "$" in word else _job_name(raw(word))

    def _entrypoint(self, word: str) -> None:
        self._keys["entrypoint"] = [self._text(word)] if word else []

    def _ipc(self, word: str) -> None:
        if word == "host":
            self.note(
                "--ipc host", "a job has a /dev/shm of its own, a quarter of its memory; write shm_size: for more"
            )
        elif word == "none":
            self._keys["ipc"] = word
        elif word not in {"private", ""}:
            self.note(f"--ipc {word}", "a job shares no memory with other containers")

    def _network(self, word: str) -> None:
        if word == "none":
            self._keys["network_mode"] = word
        elif word == "host":
            self.note("--network host", "a job is on a network of its own; publish with ports:, or write "
                      "network_mode: host where the settings allow it")  # fmt: skip
        elif word not in {"bridge", "default"}:
            self.note(f"--network {word}", "a job is on a network of its own; publish with ports:")

    def _capability(self, word: str) -> None:
        name = raw(word).upper().removeprefix("CAP_")
        where = f"; write cap_add: [{name}] where the settings allow it" if name in FEATURES["cap_add"] else ""
        self.note(f"--cap-add {word}", f"a job has no capabilities{where}")

    def _device(self, word: str) -> None:
        found = re.fullmatch(r"/dev/nvidia([0-9]{1,3})(?::.*)?|nvidia\.com/gpu=(.+)", raw(word))
        self._devices += [found[1] or found[2]] if found else []
        self.note(f"--device {word}", "devices are not passed; GPUs come by gpus:")

    def _driver(self, what: str, value: str) -> None:
        more = [word for word in raw(value).split(",") if word not in {"compute", "utility", ""}]
        self.note(what, "compute and utility of the driver are there"
                  + ("; write driver_capabilities: where the settings allow more" if more else ""))  # fmt: skip

    def _cpuset(self, word: str) -> None:
        many = 0
        for part in word.split(","):
            first, _, last = part.partition("-")
            if first.isdigit() and (not last or last.isdigit()):
                many += max(0, int(last or first) - int(first) + 1)
        if 0 < many <= 4096 and "cpus" not in self._keys:
            self._keys["cpus"] = many
        self.note(f"--cpuset-cpus {word}", "the server chooses the CPUs, near the GPUs; cpus: says how many")

    def _image(self, word: str) -> None:
        if "$" not in word:
            try:
                forms.image(raw(word))
            except SpecError as error:
                raise InvalidInput(f"image: {error.faults[0].message}") from error
        self._keys["image"] = self._text(word)
        if "name" not in self._keys:
            last = re.split(r"[@:]", raw(word).rpartition("/")[2])[0]
            self._keys["name"] = _job_name(re.sub(r"\$\{([A-Za-z0-9_]*).*", r"\1", last))

    # ------------------------------------------------------------------------------------------ GPUs

    def _set_gpus(self, word: str) -> None:
        self._gpus = word

    def _set_runtime(self, word: str) -> None:
        self._runtime = self._runtime or word == "nvidia"
        if word == "nvidia":
            self.note("--runtime nvidia", "the server chooses the runtime by gpus:")
        else:
            where = "; write runtime: runsc where the settings allow it" if word == "runsc" else ""
            self.note(f"--runtime {word}", f"the server chooses the runtime{where}")

    def _choose_gpus(self) -> None:
        """One request from --gpus, the variables and the runtime."""
        given = self._gpus
        what = f"--gpus {given}"
        if given is None and (self._visible is not None or self._runtime):
            given = self._visible if self._visible is not None else "all"
            given = given if given in {"all", "none", "void", ""} else f"device={given}"
            what = f"NVIDIA_VISIBLE_DEVICES={self._visible}" if self._visible is not None else "the nvidia runtime"
        elif given is None and self._devices:
            given = "all" if "all" in self._devices else f"device={','.join(dict.fromkeys(self._devices))}"
            what = "--device"
        if given is None or given in {"none", "void", ""}:
            return
        parts = dict(_pairs(given.strip("\"'")))
        if "device" in parts:
            self._by_device(parts["device"], what)
        elif (count := parts.get("count", "")).isdigit():
            if self._reads(what, gpukeys.count, count):
                self._keys["gpus"] = int(count)
        elif count and "$" in count:
            self._keys["gpus"] = self._text(count)
        elif self._cuda:
            self._by_device(self._cuda, f"{what} with CUDA_VISIBLE_DEVICES={self._cuda}")
        else:
            self._keys["gpus"] = 1
            self.note(what, "a job says how many GPUs it needs: 1 is written, change it")
        for key, value in parts.items():
            if key not in {"device", "count"}:
                self._driver(f"--gpus {key}={value}", value)

    def _by_device(self, devices: str, what: str) -> None:
        ids = [item.strip() for item in raw(devices).split(",") if item.strip()]
        try:
            uuids = [gpukeys.uuid(item) for item in ids]
        except SpecError:
            many = max(1, len(ids))
            self._keys["gpus"] = many
            self.note(
                what,
                f"GPUs are not chosen by index, which changes; any {many} will do, or write UUIDs: "
                "gpus: {uuid: [GPU-…]}, `gpujobs gpus` shows them",
            )
            return
        self._keys["gpus"] = {"uuid": list(dict.fromkeys(uuids))}

    def _assembled(self) -> dict[str, object]:
        lists: dict[str, object] = {
            "environment": self._environment,
            "env_file": self._env_files,
            "volumes": [_each(item, self._text) for item in self._volumes],
            "ports": self._ports,
            "ulimits": self._ulimits,
            "labels": self._labels,
            "healthcheck": self._health,
        }
        if self._health and "test" not in self._health and "disable" not in self._health:
            self.note(
                "--health-interval and the like", "they mean nothing without --health-cmd; write healthcheck: test:"
            )
            lists["healthcheck"] = {}
        if "disable" in self._health:
            lists["healthcheck"] = {"disable": True}
        for option, key, other in (("--publish", "ports", "network_mode"), ("--shm-size", "shm_size", "ipc")):
            if other in self._keys and (lists.pop(key, None) or self._keys.pop(key, None)):
                self.note(option, f"it means nothing with {other}: none")
        everything = {**self._keys, **{key: item for key, item in lists.items() if item}}
        return {key: everything[key] for key in _ORDER if key in everything}


def _each(value: object, change: Callable[[str], str]) -> object:
    """A value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _each(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each(item, change) for item in value]
    return value


def _job_name(word: str) -> str:
    """The nearest name that a job may have."""
    name = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", word).strip("-._=+")[:128]
    return name or "job"


def _pairs(text: str) -> list[tuple[str, str]]:
    """The parts of a --gpus value: ``all``, ``2``, ``device=0,2`` or ``"device=0,2",capabilities=utility``."""
    if "=" not in text:
        return [("count", text)]
    found: list[tuple[str, str]] = []
    for part in re.split(r"[,\"']+", text):
        key, equals, value = part.partition("=")
        if equals:
            found.append((key.strip(), value))
        elif found and part:
            found[-1] = (found[-1][0], f"{found[-1][1]},{part}")
    return found
