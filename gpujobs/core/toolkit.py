"""The configuration of NVIDIA's container runtime, ``config.toml``, and what in it would keep GPUs from jobs.

Keys and defaults are those of the NVIDIA Container Toolkit (internal/config/config.go and runtime.go).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gpujobs.core.finding import Finding, Level
from gpujobs.core.holes import version_of

AREA = "toolkit"
CDI_DIRECTORIES = ("/etc/cdi", "/var/run/cdi")
"""Where CDI specifications lie by default (the CDI specification's own default)."""

_MODES = ("auto", "legacy", "cdi", "jit-cdi", "csv")
_JIT_CDI_SINCE = (1, 18, 0)
"""From this version on ``auto`` means a CDI specification made at each start (the toolkit's release notes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolkitConfig:
    """What matters here of a config.toml; the defaults are NVIDIA's.

    Attributes:
        wrong: Keys with a value of another type than theirs, each with what it should be.
    """

    accept_envvar: bool = True
    accept_mounts: bool = False
    swarm_resource: str = ""
    disable_require: bool = False
    capabilities: str = "all"
    no_cgroups: bool = False
    ldconfig: str = "@/sbin/ldconfig"
    mode: str = "auto"
    cdi_directories: tuple[str, ...] = CDI_DIRECTORIES
    wrong: tuple[str, ...] = ()


def parse(content: bytes) -> ToolkitConfig | str:
    """Read a config.toml; a sentence where the runtime could not read it either."""
    import tomllib

    try:
        data = tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start})"
    except RecursionError:
        return "is nested too deeply"
    except ValueError as error:  # TOMLDecodeError, and numbers of more digits than Python reads
        return f"is no TOML: {str(error)[:200]}"
    return _Reader(data).config()


class _Reader:
    """Takes typed values out of the tables and notes what is of another type."""

    def __init__(self, data: Mapping[str, object]) -> None:
        self._data = data
        self._wrong: list[str] = []

    def config(self) -> ToolkitConfig:
        default = ToolkitConfig()
        cli, runtime = (
            self._table(self._data, "nvidia-container-cli"),
            self._table(self._data, "nvidia-container-runtime"),
        )
        cdi = self._table(self._table(runtime, "modes"), "cdi")
        found = ToolkitConfig(
            accept_envvar=self._flag(
                self._data, "accept-nvidia-visible-devices-envvar-when-unprivileged", default.accept_envvar
            ),
            accept_mounts=self._flag(
                self._data, "accept-nvidia-visible-devices-as-volume-mounts", default.accept_mounts
            ),
            swarm_resource=self._text(self._data, "swarm-resource", default.swarm_resource),
            disable_require=self._flag(self._data, "disable-require", default.disable_require),
            capabilities=self._text(self._data, "supported-driver-capabilities", default.capabilities),
            no_cgroups=self._flag(cli, "no-cgroups", default.no_cgroups),
            ldconfig=self._text(cli, "ldconfig", default.ldconfig),
            mode=self._text(runtime, "mode", default.mode),
            cdi_directories=self._texts(cdi, "spec-dirs", default.cdi_directories),
        )
        return ToolkitConfig(**{name: getattr(found, name) for name in found.__slots__} | {"wrong": tuple(self._wrong)})

    def _table(self, within: Mapping[str, object], key: str) -> Mapping[str, object]:
        value = within.get(key, {})
        if isinstance(value, dict):
            return value
        self._wrong.append(f"{key} must be a table")
        return {}

    def _flag(self, within: Mapping[str, object], key: str, default: bool) -> bool:
        value = within.get(key, default)
        if isinstance(value, bool):
            return value
        self._wrong.append(f"{key} must be true or false")
        return default

    def _text(self, within: Mapping[str, object], key: str, default: str) -> str:
        value = within.get(key, default)
        if isinstance(value, str):
            return value
        self._wrong.append(f"{key} must be a text")
        return default

    def _texts(self, within: Mapping[str, object], key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        value = within.get(key, list(default))
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        self._wrong.append(f"{key} must be a list of texts")
        return default


def broken(path: str, problem: str) -> Finding:
    """The finding for a file that the runtime cannot read."""
    return Finding(
        AREA,
        Level.ERROR,
        f"{path} {problem}: no container under the runtime starts",
        "Mend the file, or write it anew: `nvidia-ctk config --in-place`.",
    )


def findings(
    path: str, config: ToolkitConfig, version: str, specifications: tuple[str, ...], *, rootless: bool = False
) -> Iterator[Finding]:
    """What in a configuration would go wrong for jobs.

    Args:
        path: The file, for the sentences.
        config: What it says.
        version: The toolkit's; empty where not known.
        specifications: The files that describe GPUs for CDI.
        rootless: Whether the Engine runs without root.
    """
    for wrong in config.wrong:
        yield broken(path, f"is not valid ({wrong})")
    yield from _silent(path, config)
    yield from _loose(path, config)
    yield from _mode(path, config, version, specifications, rootless)


def _silent(path: str, config: ToolkitConfig) -> Iterator[Finding]:
    """Settings under which a container starts as if nothing were wrong, without its GPUs."""
    if not config.accept_envvar:
        yield Finding(
            AREA,
            Level.ERROR,
            f"{path}: accept-nvidia-visible-devices-envvar-when-unprivileged = false silently gives jobs no GPU",
            "Set it to true: the server sets the variable on every container itself and lets no job change it.",
        )
    if config.swarm_resource:
        yield Finding(
            AREA,
            Level.ERROR,
            f"{path}: swarm-resource = {config.swarm_resource!r} takes the place of NVIDIA_VISIBLE_DEVICES: jobs would"
            " get other GPUs than theirs, or none",
            "Remove swarm-resource: it is for Docker Swarm only.",
        )
    granted = {item.strip() for item in config.capabilities.split(",")}
    missing = [name for name in ("compute", "utility") if name not in granted and "all" not in granted]
    if missing:
        yield Finding(
            AREA,
            Level.ERROR,
            f"{path}: supported-driver-capabilities lacks {' and '.join(missing)}: jobs get GPUs without CUDA or NVML",
            "Remove the key: by default all capabilities are supported.",
        )


def _loose(path: str, config: ToolkitConfig) -> Iterator[Finding]:
    """Settings that loosen a check."""
    if config.accept_mounts:
        yield Finding(
            AREA,
            Level.WARNING,
            f"{path}: accept-nvidia-visible-devices-as-volume-mounts = true lets mounts name GPUs, past the variable",
            "Set it to false, unless a Kubernetes device plugin on this machine needs it.",
        )
    if config.disable_require:
        yield Finding(
            AREA,
            Level.WARNING,
            f"{path}: disable-require = true starts images whose CUDA is too new for the driver",
            "Set it to false.",
        )
    if config.ldconfig and not config.ldconfig.startswith("@"):
        # CVE-2024-0136 and CVE-2024-0137, NVIDIA's bulletin 5599: "ensure that ... ldconfig = "@/sbin/ldconfig"".
        yield Finding(
            AREA,
            Level.ERROR,
            f"{path}: ldconfig = {config.ldconfig!r} runs the image's own ldconfig as root (CVE-2024-0136, -0137)",
            'Set ldconfig = "@/sbin/ldconfig", the host\'s own, or remove the key.',
        )


def _mode(
    path: str, config: ToolkitConfig, version: str, specifications: tuple[str, ...], rootless: bool
) -> Iterator[Finding]:
    if config.mode not in _MODES:
        yield Finding(
            AREA,
            Level.ERROR,
            f"{path}: mode = {config.mode!r} is unknown: no container starts",
            f"Set mode to one of {', '.join(_MODES)}, or remove the key.",
        )
        return
    if config.mode == "csv":
        yield Finding(
            AREA, Level.WARNING, f'{path}: mode = "csv" is for Tegra boards: it knows no UUIDs', 'Set mode = "auto".'
        )
    if config.mode == "cdi" and not specifications:
        yield Finding(
            AREA,
            Level.ERROR,
            f'{path}: mode = "cdi", and {" and ".join(config.cdi_directories) or "no directory"} hold no specification'
            " of nvidia.com/gpu: no GPU can be resolved",
            "Make it: `nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`, and again after each driver update.",
        )
    if config.no_cgroups and not rootless:
        yield from _no_cgroups(path, config, version)


def _no_cgroups(path: str, config: ToolkitConfig, version: str) -> Iterator[Finding]:
    """``no-cgroups`` concerns the legacy mode; which one ``auto`` is depends on the version."""
    number = version_of(version)
    if config.mode in {"cdi", "jit-cdi"} or (
        config.mode == "auto" and number is not None and number[:3] >= _JIT_CDI_SINCE
    ):
        return
    yield Finding(
        AREA,
        Level.ERROR if config.mode == "legacy" or number is not None else Level.WARNING,
        f"{path}: no-cgroups = true: jobs see their GPUs and may not open them (NVML: Unknown Error)",
        "Set no-cgroups = false: only an Engine that runs without root needs it.",
    )
