"""Pulling images: how far it is, in numbers and in a line, and what registries' refusals mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gpujobs.core import forms
from gpujobs.core.diagnose import image_hint
from gpujobs.core.errors import GpujobsError, InvalidInput, Refused, Unavailable
from gpujobs.core.values import SpecError

_DONE = ("Pull complete", "Already exists")
_FETCHED = ("Download complete", "Verifying Checksum", "Extracting")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an image that is being pulled.

    Attributes:
        id: As the Engine shortens it.
        status: The Engine's word: ``Waiting Downloading Extracting`` … ``Pull complete``.
        current: Bytes of what the status says; None where it does not say.
        total: Of so many; None where that is not known.
    """

    id: str
    status: str
    current: int | None = None
    total: int | None = None

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return self.status in _DONE

    @property
    def part(self) -> float:
        """How much of it is done, 0-1: downloading is the first half, unpacking the second."""
        if self.done:
            return 1.0
        begun = 0.5 if self.status in _FETCHED else 0.0
        counts = self.status in ("Downloading", "Extracting") and self.current is not None and self.total
        return begun + (0.5 * min(1.0, (self.current or 0) / (self.total or 1)) if counts else 0.0)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull or a build is: the layers, none for a build's own steps, and all of it in a line."""

    layers: tuple[Layer, ...]
    text: str


class Layers:
    """Takes the Engine's events of one pull.

    Args:
        reference: The image, for the line.
    """

    def __init__(self, reference: str) -> None:
        self._reference = reference
        self._layers: dict[str, Layer] = {}
        self._most = 0.0
        self.digest: str | None = None

    def feed(self, event: Mapping[str, object]) -> None:
        """The next event: ``{"id", "status", "progressDetail": {"current", "total"}}``."""
        status, name = str(event.get("status") or ""), event.get("id")
        if status.startswith("Digest: "):
            self.digest = status.removeprefix("Digest: ").strip()
        if not isinstance(name, str) or status.startswith("Pulling from "):
            return
        detail = event.get("progressDetail")
        current, total = (detail.get("current"), detail.get("total")) if isinstance(detail, Mapping) else (None, None)
        known = self._layers.get(name)
        size = total if isinstance(total, int) and total > 0 else known.total if known else None
        done = current if isinstance(current, int) else size if status in (*_DONE, *_FETCHED) else None
        self._layers[name] = Layer(name, status, done, size)

    def progress(self) -> Progress:
        """How far it is now; the percentage never falls."""
        layers = tuple(self._layers.values())
        if not layers:
            return Progress((), f"pulling {self._reference}")
        sizes = [layer.total for layer in layers]
        weights = [size or 1 for size in sizes] if all(sizes) else [1] * len(layers)
        part = sum(layer.part * weight for layer, weight in zip(layers, weights, strict=True)) / sum(weights)
        self._most = max(self._most, part)
        there, count = sum(layer.done for layer in layers), len(layers)
        words = f"{there} of {count} layer{'s' * (count != 1)}, {int(100 * self._most)} %"
        return Progress(layers, f"pulling {self._reference}: {words}")


def checked(reference: str) -> str:
    """A reference that is one: it becomes part of a path of the Engine's API.

    Raises:
        InvalidInput: It is none.
    """
    try:
        return forms.image(reference)
    except SpecError as error:
        raise InvalidInput(str(error)) from error


def registry_of(reference: str) -> str:
    """The registry that a reference names: its first part where that looks like a host, else Docker Hub."""
    first, slash, _ = reference.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"


_HINT_LOCAL = "Without a registry: load it into the Engine (`docker load`)."


def refusal(reference: str, words: str, known: Iterable[str] = ()) -> GpujobsError:
    """What the Engine said of a pull that failed, in plain words.

    Args:
        reference: The image.
        words: The Engine's sentence.
        known: The names of the images that are there.
    """
    registry = registry_of(reference)
    for sign, kind, message, hint in _REFUSALS:
        if sign.search(words):
            fields = {"image": reference, "registry": registry, "meant": image_hint(reference, known)}
            return kind(message.format(**fields), hint=hint.format(**fields))
    return Refused(f"the image {reference} could not be pulled: {words}", hint=image_hint(reference, known))


_REFUSALS: tuple[tuple[re.Pattern[str], type[GpujobsError], str, str], ...] = tuple(
    (re.compile(sign, re.IGNORECASE), kind, message, hint)
    for sign, kind, message, hint in (
        (
            r"no space left on device",
            Unavailable,
            "there is no space left on the Engine's disk for the image {image}",
            "Free some (`docker system df` shows what is used), or ask the administrator.",
        ),
        (
            r"invalid reference format|repository name must be lowercase|invalid (?:tag|repository)",
            InvalidInput,
            "{image} is no valid image name",
            "Such as pytorch/pytorch:2.4.0 or registry.example.org:5000/team/image:tag, in small letters.",
        ),
        (
            r"server gave HTTP response to HTTPS client",
            Refused,
            "the registry {registry} of the image {image} speaks plain http, which the Engine does not trust",
            "Give it TLS, or have the administrator add it to `insecure-registries` of the Engine's daemon.json.",
        ),
        (
            r"x509|certificate|tls: ",
            Refused,
            "the registry {registry} of the image {image} has a certificate that the Engine does not trust",
            "The administrator puts its CA into /etc/docker/certs.d/{registry}/ca.crt.",
        ),
        (
            r"no such host|server misbehaving|Temporary failure in name resolution",
            Unavailable,
            "the registry {registry} of the image {image} is not found: no such host",
            "Check its name and this machine's DNS. " + _HINT_LOCAL,
        ),
        (
            r"connection refused",
            Unavailable,
            "nobody answers at the registry {registry} of the image {image}: connection refused",
            "Check its name and port, and whether it runs. " + _HINT_LOCAL,
        ),
        (
            r"manifest unknown|manifest for .* not found|not found: manifest|name unknown|repository name not known",
            Refused,
            "the registry {registry} has no image {image}",
            "{meant}",
        ),
        (
            r"unauthorized|authentication required|no basic auth credentials|pull access denied|denied: |403 Forbidden",
            Refused,
            "the registry {registry} does not give out the image {image}: it does not exist there, or needs a login",
            "{meant} gpujobs logs in nowhere: an image behind a login is pulled or loaded by the administrator.",
        ),
        (
            r"toomanyrequests|429 Too Many",
            Unavailable,
            "the registry {registry} gives out no more images for now (its rate limit)",
            "Try again later. " + _HINT_LOCAL,
        ),
        (
            r"no matching manifest|does not match the specified platform",
            Refused,
            "the registry {registry} has the image {image} for other kinds of machines only",
            "Use one that is built for this machine's.",
        ),
        (
            r"time-?out|deadline exceeded|unreachable|no route to host|connection reset|proxyconnect|\bEOF\b",
            Unavailable,
            "the registry {registry} of the image {image} cannot be reached from here",
            "Check the network and the Engine's proxy settings. " + _HINT_LOCAL,
        ),
    )
)
