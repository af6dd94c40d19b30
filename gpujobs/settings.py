"""The server's settings: ``/etc/gpujobs/server.yaml`` or ``--config FILE``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from annotated_types import Ge, Gt, Lt
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from gpujobs.core import forms
from gpujobs.core.errors import InvalidInput, Problem
from gpujobs.core.spec import Volume, volumes_of
from gpujobs.core.values import Context, duration, size

_CONTEXT = Context(file="", directory="/", home="/nonexistent", variables={})


def _seconds(value: object) -> object:
    return duration(value, 0) if isinstance(value, str) else value


def _bytes(value: object) -> object:
    return size(value, 1) if isinstance(value, str) else value


def _environment(value: object) -> object:
    return forms.environment(value, _CONTEXT)


def _volumes(value: object) -> object:
    found = volumes_of(value, _CONTEXT)
    for volume in found:
        if volume.type != "bind":
            raise ValueError(f"{volume.target}: only directories and files of the host can be given to every job")
    return found


_CONFIG = ConfigDict(extra="forbid", strict=False)


@validated(frozen=True, kw_only=True, config=_CONFIG)
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an administrator can set; each default is what an absent key means.

    Attributes:
        runtime: The OCI runtime that gives containers their GPUs.
        keep_ended: Seconds for which an ended job's container is kept.
        memory_reserve: The part of the host's memory that is given to no job, 0-1.
        admins: Accounts that may act on everybody's jobs, besides root.
        environment: Variables that every job has, such as proxies and the place of a model cache; the job
            file's win.
        build_memory: Bytes of memory that each step of a build may use.
        build_cpus: CPUs of the same.
        build_time: Seconds that a build may take.
        volumes: Mounts that every job has where its owner can open them, such as shared data sets: as in a job
            file, bind mounts only.
    """

    runtime: str = "nvidia"
    keep_ended: Annotated[float, BeforeValidator(_seconds), Ge(0)] = 86400.0
    memory_reserve: Annotated[float, Ge(0), Lt(1)] = 0.1
    admins: tuple[str, ...] = ()
    build_memory: Annotated[int, BeforeValidator(_bytes), Ge(64 * 2**20)] = 8 * 2**30
    build_cpus: Annotated[float, Gt(0)] = 4.0
    build_time: Annotated[float, BeforeValidator(_seconds), Gt(0)] = 3600.0
    environment: Annotated[tuple[tuple[str, str], ...], BeforeValidator(_environment)] = ()
    volumes: Annotated[tuple[Volume, ...], BeforeValidator(_volumes)] = ()


_ADAPTER = TypeAdapter(Settings)


def load(path: Path | None) -> Settings:
    """The settings of a file; the defaults where there is none.

    Raises:
        InvalidInput: It cannot be read or says something that is not allowed; nothing of it is used.
    """
    if path is None:
        return Settings()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _ADAPTER.validate_python({} if data is None else data)
    except OSError as error:
        raise InvalidInput(f"the settings {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the settings {path} are not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise InvalidInput(f"the settings {path} are no YAML: {error}") from error
    except ValidationError as error:
        problems = tuple(
            Problem(str(path), 0, 0, ".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()
        )
        raise InvalidInput(f"the settings {path} are not valid", hint="docs/operations.md lists them.",
                           problems=problems) from error  # fmt: skip
