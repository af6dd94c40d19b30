"""One server per Engine: the lock, against a real Engine of this module's own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import docker
import pytest

from gpujobs.adapters import enginelock
from gpujobs.adapters.engine import Engine
from gpujobs.adapters.enginelock import Holder, acquire, holds, release
from gpujobs.core.errors import Refused
from tests.lab import accounts
from tests.lab import engine as lab

T = TypeVar("T")

ROOT = Path(__file__).parents[2]

CONTENDER = """
import asyncio, sys
from gpujobs.adapters.engine import Engine
from gpujobs.adapters.enginelock import acquire
from gpujobs.core.errors import GpujobsError

async def main():
    engine = Engine(sys.argv[1])
    await engine.info()
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        await acquire(engine)
        print("won", flush=True)
    except GpujobsError as error:
        print(type(error).__name__, error, flush=True)
    sys.stdin.readline()
    engine.close()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    daemon = lab.Engine.private(tmp_path_factory.mktemp("engine"))
    try:
        yield daemon.host
    finally:
        daemon.destroy()


@pytest.fixture
def client(host: str) -> Iterator[docker.APIClient]:
    with closing(docker.APIClient(base_url=host, version="auto")) as client:
        yield client
        for name in names(client):
            client.remove_volume(name)


@pytest.fixture
def engine(host: str, client: docker.APIClient) -> Iterator[Engine]:
    with closing(Engine(host)) as engine:
        yield engine


def names(client: docker.APIClient) -> list[str]:
    return sorted(row["Name"] for row in client.volumes()["Volumes"] or [])


def run(work: Any) -> Any:
    return asyncio.run(work)


class Contender:
    """Another process that will try to take the lock."""

    def __init__(self, host: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTENDER, host], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def try_it(self) -> str:
        assert self.line() == "ready"
        self.go()
        return self.line()


@contextmanager
def contenders(host: str, count: int) -> Iterator[list[Contender]]:
    started = [Contender(host) for _ in range(count)]
    try:
        yield started
    finally:
        for one in started:
            one.process.kill()
            one.process.communicate()


def squat(client: docker.APIClient, number: int, holder: Holder) -> None:
    client.create_volume(f"gpujobs-lock-{number}", labels=holder.labels())


def living() -> Holder:
    """A holder that lives as long as this test."""
    return Holder.me()


# -- two servers ----------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_told_the_holders_pid_and_uid(host: str, engine: Engine) -> None:
    with contenders(host, 1) as (other,):
        assert other.try_it() == "won"
        with pytest.raises(Refused) as caught:
            run(acquire(engine))
        assert f"another gpujobs server (pid {other.process.pid}, uid {os.getuid()}) uses this Docker Engine" in str(
            caught.value
        )
        assert caught.value.exit == 3


def test_of_ten_contenders_at_once_exactly_one_wins_and_the_others_name_it(host: str, client: docker.APIClient) -> None:
    with contenders(host, 10) as ten:
        assert [one.line() for one in ten] == ["ready"] * 10
        for one in ten:
            one.go()
        said = {one: one.line() for one in ten}
        (winner,) = [one for one, words in said.items() if words == "won"]
        rest = [words for words in said.values() if words != "won"]
        assert len(names(client)) == 1
    assert all(words.startswith(f"Refused another gpujobs server (pid {winner.process.pid}, ") for words in rest)


def test_of_ten_contenders_for_a_dead_holders_lock_exactly_one_wins(host: str, client: docker.APIClient) -> None:
    squat(client, 7, replace(living(), start=1))
    with contenders(host, 10) as ten:
        assert [one.line() for one in ten] == ["ready"] * 10
        for one in ten:
            one.go()
        assert sorted(one.line().split()[0] for one in ten) == ["Refused"] * 9 + ["won"]
        assert names(client) == ["gpujobs-lock-8"], "the dead holder's is tidied up"


def test_a_lock_that_was_given_back_is_free(engine: Engine, client: docker.APIClient) -> None:
    mine = run(acquire(engine))
    assert names(client) == ["gpujobs-lock-1"]
    run(release(engine, mine))
    assert names(client) == []
    run(release(engine, mine))
    assert run(acquire(engine)).nonce != mine.nonce


def test_giving_back_takes_nothing_from_another_holder(engine: Engine, client: docker.APIClient) -> None:
    squat(client, 1, living())
    run(release(engine, replace(living(), nonce="another")))
    assert names(client) == ["gpujobs-lock-1"]


# -- holders that are no more ---------------------------------------------------------------------------------


def test_a_holder_that_was_killed_is_replaced(host: str, engine: Engine, client: docker.APIClient) -> None:
    with contenders(host, 1) as (other,):
        assert other.try_it() == "won"
        other.process.send_signal(signal.SIGKILL)
        other.process.wait()
        mine = run(acquire(engine))
    assert names(client) == ["gpujobs-lock-2"]
    assert run(holds(engine, mine))


def test_a_zombie_holds_nothing(host: str, engine: Engine) -> None:
    with contenders(host, 1) as (other,):
        assert other.try_it() == "won"
        other.process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, other.process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has reaped it
        assert run(acquire(engine))


@pytest.mark.parametrize(
    "gone",
    [
        lambda me: replace(me, boot="11111111-2222-3333-4444-555555555555"),
        lambda me: replace(me, start=me.start - 1),
        lambda me: replace(me, pid=2**22 - 1),
    ],
    ids=["of an earlier boot", "whose pid is another process's now", "whose pid is nobody's"],
)
def test_a_holder_is_replaced(gone: Callable[[Holder], Holder], engine: Engine, client: docker.APIClient) -> None:
    squat(client, 3, gone(living()))
    run(acquire(engine))
    assert names(client) == ["gpujobs-lock-4"]


@pytest.mark.parametrize(
    "hidden",
    [
        lambda me: replace(me, namespace="pid:[1]"),
        lambda me: replace(me, pid=1, start=int(Path("/proc/1/stat").read_text().split()[21])),
    ],
    ids=["in another PID namespace", "that is another account's"],
)
def test_a_holder_of_which_it_cannot_be_told_is_taken_to_live(
    hidden: Callable[[Holder], Holder], engine: Engine, client: docker.APIClient
) -> None:
    squat(client, 3, hidden(living()))
    with pytest.raises(Refused, match="another gpujobs server"):
        run(acquire(engine))
    assert names(client) == ["gpujobs-lock-3"]


def test_a_volume_of_that_name_without_our_labels_holds_nothing_and_is_left_alone(
    engine: Engine, client: docker.APIClient
) -> None:
    client.create_volume("gpujobs-lock-1", labels={"owner": "somebody"})
    client.create_volume("gpujobs-lock-x")
    client.create_volume("my-gpujobs-lock-9")
    mine = run(acquire(engine))
    assert run(holds(engine, mine))
    assert names(client) == ["gpujobs-lock-1", "gpujobs-lock-2", "gpujobs-lock-x", "my-gpujobs-lock-9"]


# -- pruned, and late -----------------------------------------------------------------------------------------


def test_a_lock_that_somebody_pruned_is_taken_again(engine: Engine, client: docker.APIClient) -> None:
    mine = run(acquire(engine))
    client.prune_volumes()
    for name in names(client):  # newer Engines prune anonymous volumes only
        client.remove_volume(name)
    assert run(holds(engine, mine))
    (name,) = names(client)
    assert Holder.of(client.inspect_volume(name)["Labels"]) == mine


def test_a_lock_that_another_took_after_a_pruning_is_lost(host: str, engine: Engine, client: docker.APIClient) -> None:
    mine = run(acquire(engine))
    client.remove_volume("gpujobs-lock-1")
    with contenders(host, 1) as (other,):
        assert other.try_it() == "won"
        assert not run(holds(engine, mine))
        assert len(names(client)) == 1


def test_who_looked_long_ago_gives_way_to_the_holder_of_today(client: docker.APIClient) -> None:
    """It saw a dead holder, slept, and makes the next volume beside that of a holder who came and stayed."""
    today = living()
    squat(client, 5, today)

    class Late(docker.APIClient):
        looked = False

        def volumes(self, filters: Any = None) -> Any:
            seen = super().volumes(filters)
            if not self.looked:
                self.looked = True
                seen["Volumes"] = [{"Name": "gpujobs-lock-1", "Labels": replace(today, start=1).labels()}]
            return seen

    late = Late(base_url=host_of(client), version="auto")
    with closing(late), pytest.raises(Refused, match=f"pid {os.getpid()}"):
        enginelock._acquire(late, replace(today, nonce="late"))
    assert names(client) == ["gpujobs-lock-5"]


def host_of(client: docker.APIClient) -> str:
    return f"unix://{client.get_adapter(client.base_url).socket_path}"


def test_a_holder_that_looks_while_a_late_one_gives_way_keeps_its_lock(
    engine: Engine, client: docker.APIClient
) -> None:
    mine = run(acquire(engine))
    squat(client, 9, living())
    assert run(holds(engine, mine))


# -- who must not ---------------------------------------------------------------------------------------------

SQUATTER = """
import socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect(sys.argv[1])
"""


def test_an_account_without_access_to_docker_cannot_make_a_lock(
    host: str, engine: Engine, client: docker.APIClient
) -> None:
    account, *_ = accounts.ensure(1)
    done = accounts.run_as(account, ["/usr/bin/python3", "-c", SQUATTER, host.removeprefix("unix://")])
    assert "PermissionError" in done.stderr
    assert run(acquire(engine))


def test_no_file_that_an_account_can_make_is_asked_for(host: str, client: docker.APIClient, tmp_path: Path) -> None:
    """Taking the lock opens no file outside of /proc and of what Python and docker-py read themselves."""
    audit = (
        "import sys\n"
        "def tell(event, args):\n"
        "    if event == 'open' and args[1] and set('wax+') & set(str(args[1])):\n"
        "        print('wrote', args[0], flush=True)\n"
        "sys.addaudithook(tell)"
    )
    with subprocess.Popen(
        [sys.executable, "-B", "-c", f"{audit}\n{CONTENDER}", host],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        out, _ = process.communicate("\n\n")
    assert out.split() == ["ready", "won"]
