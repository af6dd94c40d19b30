"""Build step of the package: compiles the container init. Everything else is in pyproject.toml."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.build import build
from setuptools.errors import CompileError

SOURCE = "gpujobs/init/gpujobs-init.c"
TARGET = "gpujobs/init/gpujobs-init"
FLAGS = ["-static", "-O2", "-Wall", "-Wextra", "-Werror"]
NEEDED = "install the packages gcc and libc6-dev (a C compiler and the static C library), then try again"


class BuildInit(Command):
    """Compiles ``gpujobs-init``; a sub-command of ``build`` (setuptools' SubCommand protocol)."""

    description = "compile the static container init"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [
        ("build-lib=", None, "directory to build into")
    ]

    def initialize_options(self) -> None:
        """Declare what ``build`` and ``editable_wheel`` set."""
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        """Build where the package's modules are built."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        """Compile beside the source for an editable install, into ``build_lib`` otherwise.

        Raises:
            CompileError: There is no compiler or no static C library, or the source does not compile.
        """
        target = Path(self.get_outputs()[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file moved into place: running containers have the old one open, and writing to it would fail.
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, "-o", str(fresh), SOURCE]
        try:
            subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True, errors="replace")
            fresh.chmod(0o755)
            fresh.replace(target)
        except FileNotFoundError:
            raise CompileError(f"cannot build the container init: no {command[0]}: {NEEDED}") from None
        except subprocess.CalledProcessError as failed:
            # A missing libc.a, a missing header; anything else is a mistake in the source or the flags.
            lacking = "cannot find -lc" in failed.stderr or "fatal error" in failed.stderr
            advice = f": {NEEDED}" if lacking else ""
            raise CompileError(f"cannot build the container init{advice}\n{failed.stderr}") from None
        finally:
            fresh.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        """Return the path of the binary."""
        return [TARGET if self.editable_mode else str(Path(self.build_lib or ".", TARGET))]

    def get_output_mapping(self) -> dict[str, str]:
        """Return no mapping: the binary is compiled, not copied from the source tree."""
        return {}

    def get_source_files(self) -> list[str]:
        """Return the C source, for source distributions."""
        return [SOURCE]


class Build(build):
    """The usual build and the container init."""

    sub_commands: ClassVar[list[tuple[str, object]]] = [*build.sub_commands, ("build_init", None)]


class BinaryDistribution(Distribution):
    """Says that wheels hold machine code, so that they are tagged with their platform."""

    def has_ext_modules(self) -> bool:
        """Return true: the wheel is not for any machine."""
        return True


setup(cmdclass={"build": Build, "build_init": BuildInit}, distclass=BinaryDistribution)
