"""The lab's images, made without a registry and imported into an Engine that has not got them yet.

Every image carries a label with the hash of what it is made from: a changed recipe is built again, an
unchanged one costs one look. The file systems are kept below ``/var/cache/gpujobs-lab`` for the next Engine.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tests.lab.engine import CACHE, Engine, LabError, get, install_packages, run

BUSYBOX = "gpujobs-lab/busybox:1"
CUDA_LIKE = "gpujobs-lab/cuda-like:1"
HOSTILE = "gpujobs-lab/hostile:1"
PYTHON = "gpujobs-lab/python:1"

RECIPE_LABEL = "gpujobs-lab.recipe"
HOSTILE_MARK = Path("/tmp/gpujobs-lab-evil")  # written by the hostile image's code wherever that runs

SCIKIT_LEARN = "scikit-learn==1.5.2"
DIGITS_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
DEBIAN_PACKAGES = ("python3-minimal", "python3-numpy", "python3-venv")  # the last for images built on it
DEBOOTSTRAP_MEMORY = 2 << 30  # bytes; with that much it works in memory, where dpkg's fsync costs nothing

PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
GROUP = "root:x:0:\nnogroup:x:65534:\n"

EVIL_C = f"""\
/* Loaded by LD_PRELOAD into any dynamic program that starts with this image's environment: says as whom. */
#include <stdio.h>
#include <unistd.h>
__attribute__((constructor)) static void loaded(void) {{
    FILE *mark = fopen("{HOSTILE_MARK}", "a");
    if (!mark) return;
    fprintf(mark, "uid %d pid %d\\n", (int)getuid(), (int)getpid());
    fclose(mark);
}}
"""


@dataclass(frozen=True)
class Image:
    """One image: its name, its configuration as Dockerfile instructions, and its file system.

    Attributes:
        name: repository and tag.
        changes: Dockerfile instructions, as ``docker import --change`` takes them.
        recipe: all that the file system is made from; with ``changes`` it is what the label's hash is of.
        root: makes the file system and returns the path of its tar file.
    """

    name: str
    changes: tuple[str, ...]
    recipe: str
    root: Callable[[], Path]

    @property
    def digest(self) -> str:
        """The hash that the image's label carries."""
        return hashlib.sha256(json.dumps([self.name, self.changes, self.recipe]).encode()).hexdigest()[:16]


def _tar(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Write a tar file whose bytes depend on its entries alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with tarfile.open(partial, "w") as archive:
        for info, data in entries:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    partial.replace(path)
    return path


def _entry(name: str, mode: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode, info.type, info.linkname = mode, kind, link
    return info


def _busybox_entries(group: str = GROUP) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Return a root with busybox under all its names, a writable /tmp and the files a program looks for."""
    applets = run("/bin/busybox", "--list").split()
    plain = ("bin", "dev", "etc", "proc", "sys", "home")
    directories = [_entry(name, 0o755, tarfile.DIRTYPE) for name in plain]
    directories += [_entry("root", 0o700, tarfile.DIRTYPE), _entry("tmp", 0o1777, tarfile.DIRTYPE)]
    applets.remove("busybox")
    links = [_entry(f"bin/{name}", 0o777, tarfile.SYMTYPE, "busybox") for name in applets]
    return [
        *((info, b"") for info in directories),
        (_entry("bin/busybox", 0o755), Path("/bin/busybox").read_bytes()),
        *((info, b"") for info in links),
        (_entry("etc/passwd", 0o644), PASSWD.encode()),
        (_entry("etc/group", 0o644), group.encode()),
    ]


def _busybox_root() -> Path:
    return _tar(CACHE / "busybox.tar", _busybox_entries())


def _hostile_root() -> Path:
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "evil.c"), Path(directory, "evil.so")
        source.write_text(EVIL_C)
        run("gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source))
        evil = library.read_bytes()
    # The added line hands group 42 (shadow, on Debian) to a container of "--user 5001:5001".
    entries = [*_busybox_entries(GROUP + "5001:x:42:\n"), (_entry("evil.so", 0o755), evil)]
    return _tar(CACHE / "hostile.tar", entries)


# --- Debian with python3 and numpy --------------------------------------------------------------------------

# Runs in a mount namespace of its own: whatever happens, no mount of it stays behind.
DEBOOTSTRAP_SH = """\
set -eu
suite=$1 mirror=$2 include=$3 work=$4 extra=$5 target=$6 in_memory=$7
[ "$in_memory" = 0 ] || mount -t tmpfs -o mode=0755,size=2g lab "$work"
root=$work/root
log=$work/debootstrap.log
debootstrap --variant=minbase --include="$include" "$suite" "$root" "$mirror" >"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    exit 1
}
rm -rf "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/locale/* "$root"/usr/share/info/*
rm -rf "$root"/usr/share/lintian "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*
rm -f "$root"/etc/apt/sources.list "$root"/etc/resolv.conf "$root"/etc/hostname
cp -r "$extra" "$root/data"
chroot "$root" python3 -c 'import numpy'
tar -C "$root" --one-file-system --exclude='./proc/*' --exclude='./sys/*' --exclude='./dev/*' \\
    -cf "$target.partial" .
mv "$target.partial" "$target"
"""


def _codename() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    return next(line for line in lines if line.startswith("VERSION_CODENAME=")).partition("=")[2].strip('"')


def _mirror(codename: str) -> str:
    """Return the mirror from which apt takes this release, so that debootstrap asks no other.

    Raises:
        LabError: when apt has none, also after an update of its lists.
    """
    def ask() -> list[str]:
        lines = run("apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)",
                    "Created-By: Packages").splitlines()
        found = [line.split() for line in lines]
        return [uri for name, component, uri in found if (name, component) == (codename, "main")]

    mirrors = ask()
    if not mirrors:
        run("apt-get", "-q", "update", timeout=300)  # a machine that never did has no list of targets
        mirrors = ask()
    if not mirrors:
        raise LabError(f"apt has no source for {codename} main")
    return mirrors[0]


def _apt_proxy() -> dict[str, str]:
    """Return the environment in which debootstrap's downloads go through apt's proxy, if it has one."""
    proxy = run("apt-config", "dump", "--format", "%v%n", "Acquire::http::Proxy").strip()
    return {"http_proxy": proxy} if proxy and proxy != "DIRECT" else {}


def _download_digits(target: Path) -> None:
    """Take the handwritten digits, their description and licence out of the scikit-learn package."""
    wanted = {"digits.csv.gz": "digits.csv.gz", "digits.rst": "digits.rst", "COPYING": "LICENSE.digits"}
    with tempfile.TemporaryDirectory() as directory:
        run(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary", ":all:", "--dest", directory, SCIKIT_LEARN, timeout=300)
        wheel = next(Path(directory).glob("*.whl"))
        with zipfile.ZipFile(wheel) as package:
            for member in package.namelist():
                if name := wanted.get(member.rpartition("/")[2]):
                    (target / name).write_bytes(package.read(member))
    digest = hashlib.sha256((target / "digits.csv.gz").read_bytes()).hexdigest()
    if digest != DIGITS_SHA256:
        raise LabError(f"digits.csv.gz of {SCIKIT_LEARN} has hash {digest}, not {DIGITS_SHA256}")


def _memory_available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _python_root() -> Path:
    key = hashlib.sha256(_python_recipe().encode()).hexdigest()[:16]
    target = CACHE / f"python-{key}.tar"
    if target.exists():
        return target
    for old in CACHE.glob("python-*.tar*"):
        old.unlink()
    codename = _codename()
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        work, data = Path(directory, "work"), Path(directory, "data")
        work.mkdir()
        data.mkdir(mode=0o755)
        _download_digits(data)
        in_memory = "1" if _memory_available() > DEBOOTSTRAP_MEMORY else "0"
        quiet = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
        run("unshare", "--mount", "sh", "-c", DEBOOTSTRAP_SH, "debootstrap", codename, _mirror(codename),
            ",".join(DEBIAN_PACKAGES), str(work), str(data), str(target), in_memory,
            timeout=900, env={**os.environ, **_apt_proxy(), **quiet})
    return target


def _python_recipe() -> str:
    return json.dumps([DEBOOTSTRAP_SH, DEBIAN_PACKAGES, _codename(), SCIKIT_LEARN, DIGITS_SHA256])


# --- the list -----------------------------------------------------------------------------------------------

def recipes() -> dict[str, Image]:
    """Return all images by name."""
    busybox = hashlib.sha256(Path("/bin/busybox").read_bytes()).hexdigest()
    images = (
        Image(BUSYBOX, ('CMD ["sh"]', "ENV PATH=/bin"), busybox + PASSWD + GROUP, _busybox_root),
        # What the environment of nvidia/cuda images looks like, and loader variables, which images set too.
        Image(CUDA_LIKE, (
            'CMD ["sh"]', "ENV PATH=/bin",
            "ENV CUDA_VERSION=12.4 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=all",
            "ENV LD_LIBRARY_PATH=/x LD_PRELOAD=/x/preload.so",
        ), busybox + PASSWD + GROUP, _busybox_root),
        # Made to harm: code for the host's hooks, group 42, forged labels, a health check at full speed.
        Image(HOSTILE, (
            'CMD ["sh"]', "ENV PATH=/bin", "ENV LD_PRELOAD=/proc/self/cwd/evil.so",
            "ENV NVIDIA_VISIBLE_DEVICES=all CUDA_VERSION=12.4", "LABEL gpujobs.job=1", "VOLUME /anonymous",
            "HEALTHCHECK --interval=1ms CMD true",
        ), busybox + PASSWD + GROUP + EVIL_C, _hostile_root),
        Image(PYTHON, (
            'CMD ["python3"]', "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "ENV LANG=C.UTF-8 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1", "WORKDIR /workspace",
        ), _python_recipe(), _python_root),
    )
    return {image.name: image for image in images}


def _look_up(engine: Engine, image: Image) -> tuple[str, str]:
    """Return (id, recipe's hash) of what the Engine has under the image's name; empty where there is none."""
    body = get(engine.host, f"/images/{quote(image.name)}/json")
    if body is None:
        return "", ""
    found = json.loads(body)
    return found["Id"], (found["Config"]["Labels"] or {}).get(RECIPE_LABEL, "")


def present(engine: Engine, image: Image) -> bool:
    """Tell whether the Engine has the image as its recipe is now."""
    return _look_up(engine, image)[1] == image.digest


def ensure(engine: Engine, *names: str) -> list[str]:
    """Make the images that the Engine has not, or not as their recipes are now.

    Args:
        engine: where they shall be.
        names: which ones; all by default.

    Returns:
        The names of those that were imported.

    Raises:
        LabError: when a program that makes them fails, with its words.
    """
    install_packages()
    CACHE.mkdir(parents=True, exist_ok=True)
    made = []
    for name, image in recipes().items():
        if (names and name not in names) or present(engine, image):
            continue
        _import(engine, image)
        made.append(name)
    return made


def _import(engine: Engine, image: Image) -> None:
    old, _ = _look_up(engine, image)
    command = ["docker", "import"]
    for change in (*image.changes, f"LABEL {RECIPE_LABEL}={image.digest}"):
        command += ["--change", change]
    with image.root().open("rb") as root:
        done = subprocess.run([*command, "-", image.name], stdin=root, check=False, capture_output=True,
                              text=True, env=engine.environment(), timeout=300)
    if done.returncode != 0:
        raise LabError(f"docker import {image.name}: {done.stderr.strip()}")
    if old:
        with suppress(LabError):  # a container still needs it
            engine.docker("image", "rm", old)


def clear_cache() -> None:
    """Forget the file systems that were made; the next ``ensure`` makes them anew."""
    shutil.rmtree(CACHE, ignore_errors=True)
