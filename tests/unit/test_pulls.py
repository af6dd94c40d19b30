"""How far a pull is, and what registries' words mean. The events and sentences are those of Engine 20.10."""

from __future__ import annotations

import pytest

from gpujobs.core.errors import GpujobsError, InvalidInput, Refused, Unavailable
from gpujobs.core.pulls import Layers, refusal


def event(name: str, status: str, current: int | None = None, total: int | None = None) -> dict[str, object]:
    detail = {} if total is None else {"current": current, "total": total}
    return {"id": name, "status": status, "progressDetail": detail}


def test_progress_counts_layers_and_never_goes_back() -> None:
    layers = Layers("x:1")
    said = [layers.progress().text]
    for item in (
        {"status": "Pulling from x", "id": "1"},
        event("a", "Pulling fs layer"), event("b", "Already exists"), event("a", "Downloading", 50, 100),
        event("a", "Downloading", 100, 100), event("a", "Verifying Checksum"), event("a", "Download complete"),
        event("a", "Extracting", 10, 100), event("c", "Waiting"), event("a", "Pull complete"),
        event("c", "Pull complete"),
        {"status": "Digest: sha256:abc"}, {"status": "Status: Downloaded newer image for x:1"},
    ):  # fmt: skip
        layers.feed(item)
        said.append(layers.progress().text)
    assert said[0] == "pulling x:1"
    assert said[5] == "pulling x:1: 1 of 2 layers, 75 %"
    assert said[-1] == "pulling x:1: 3 of 3 layers, 100 %"
    percents = [int(text.split()[-2]) for text in said if text.endswith("%")]
    assert percents == sorted(percents)
    assert layers.digest == "sha256:abc"


@pytest.mark.parametrize(("words", "kind", "message"), [
    ('Get "https://r.x/v2/": dial tcp: lookup r.x on 10.0.0.53:53: no such host', Unavailable, "found: no such host"),
    ('Get "http://127.0.0.1:9/v2/": dial tcp 127.0.0.1:9: connect: connection refused', Unavailable, "nobody answers"),
    ('Get "https://1.2.3.4:5/v2/": http: server gave HTTP response to HTTPS client', Refused, "speaks plain http"),
    ('Get "https://r.x/v2/": x509: certificate signed by unknown authority', Refused, "certificate"),
    ("manifest for r.x/a:1 not found: manifest unknown: manifest unknown", Refused, "has no image r.x/a:1"),
    ("pull access denied for a, repository does not exist or may require 'docker login'", Refused, "needs a login"),
    ('Head "http://r.x/v2/a/manifests/1": no basic auth credentials', Refused, "needs a login"),
    ("toomanyrequests: You have reached your pull rate limit.", Unavailable, "rate limit"),
    ("write /var/lib/docker/tmp/GetImageBlob1: no space left on device", Unavailable, "no space left"),
    ("invalid reference format", InvalidInput, "no valid image name"),
    ("no matching manifest for linux/amd64 in the manifest list entries", Refused, "other kinds of machines"),
    ('Get "https://r.x/v2/": net/http: request canceled (Client.Timeout exceeded)', Unavailable, "cannot be reached"),
    ('Get "https://r.x/v2/": dial tcp 1.2.3.4:443: i/o timeout', Unavailable, "cannot be reached"),
    ("something new", Refused, "could not be pulled: something new"),
])  # fmt: skip
def test_registries_words_are_told_plainly(words: str, kind: type[GpujobsError], message: str) -> None:
    error = refusal("r.x/a:1", words)
    assert type(error) is kind
    assert message in error.message
    assert error.hint


def test_a_near_name_that_is_there_is_suggested() -> None:
    assert refusal("pytroch:2", "manifest unknown", ["pytorch:2", "busybox:1"]).hint == "Did you mean pytorch:2?"
