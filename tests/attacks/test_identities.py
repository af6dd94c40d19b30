"""Who asks: processes that show the server other numbers, groups and namespaces than their account has."""

from __future__ import annotations

import grp
import os

import pytest

from tests.attacks.tools import output, raw, request, submission
from tests.e2e.conftest import GROUP
from tests.e2e.harness import GPUJOBS, Place, Row, Server, run
from tests.lab.accounts import Account

LISTING = request("GET", "/v1/jobs")


@pytest.fixture
def numbered(server: Server) -> tuple[str, ...]:
    """A command that gives a process of root's numbers of no account, and the group that the socket is open to."""
    return ("setpriv", f"--groups={grp.getgrnam(GROUP).gr_gid}")


@pytest.mark.parametrize(
    ("uid", "words"), [(4987, "uid 4987 has no account on this machine"), (65534, "is nobody's account")]
)
def test_a_number_without_an_account_is_nobody_though_the_socket_lets_it_in(
    server: Server, numbered: tuple[str, ...], uid: int, words: str
) -> None:
    """Whoever went by the socket's mode and the peer's number alone would run jobs as that number."""
    alike = [*numbered, f"--reuid={uid}", f"--regid={uid}"]
    seen = run([*alike, "sh", "-c", f"test -w {server.socket} && id -u"], {})
    assert seen.out == f"{uid}\n".encode(), seen
    for asked in (LISTING, request("POST", "/v1/jobs", submission())):
        answer = raw(server, None, asked, *alike)
        assert (answer.status, answer.body["exit"]) == (403, 3)
        assert words in answer.body["message"]


AS_ROOT = ("unshare", "--user", "--map-root-user")


def test_root_of_a_user_namespace_is_the_account_that_made_it(server: Server, bob: Account, waiting: Row) -> None:
    """Asked what it is, it says root; the kernel tells the server what it is outside."""
    assert run([*AS_ROOT, "id", "-u"], {}, user=bob).out == b"0\n"
    cancel = request("POST", f"/v1/jobs/{waiting['id']}/cancel", {})
    run_as = request("POST", "/v1/jobs", submission(run_as="gjlab1"))
    for asked in (cancel, run_as):
        answer = raw(server, bob, asked, *AS_ROOT)
        assert (answer.status, answer.body["exit"]) == (403, 3), answer
    assert server.job(str(waiting["id"]))["state"] == "queued"
    answer = raw(server, bob, request("POST", "/v1/jobs", submission({"image": "nobody/has:this"})), *AS_ROOT)
    assert answer.status == 201, answer
    row = server.ended(str(answer.body["jobs"][0]["id"]))
    assert row["owner"] == bob.name


def test_a_process_in_a_pid_namespace_of_its_own_is_taken_for_one_in_a_container(server: Server, bob: Account) -> None:
    """The rest of it is the same: an account makes such a namespace by itself, and could leave it to any program."""
    assert raw(server, bob, LISTING).status == 200
    answer = raw(server, bob, LISTING, *AS_ROOT, "--pid", "--fork")
    assert (answer.status, answer.body["exit"]) == (403, 3)
    assert "not for processes inside containers" in answer.body["message"]


def test_a_group_that_only_the_process_has_is_not_given_to_its_job(
    server: Server, alice: Account, place: Place
) -> None:
    """A setgid program of a group, or a group that was taken from the account since, leaves processes that have it."""
    file = place.path / "file"
    file.write_text("for group 42\n")
    os.chown(file, 0, 42)
    file.chmod(0o640)
    with_more = ("setpriv", f"--reuid={alice.uid}", f"--regid={alice.gid}",
                 f"--groups=42,{grp.getgrnam(GROUP).gr_gid}")  # fmt: skip
    assert run([*with_more, "cat", str(file)], {}).out == b"for group 42\n"
    job = {"command": ["sh", "-c", "id -G; cat /e/file"], "volumes": [f"{place.path}:/e:ro"], "cpus": 0.1}
    answer = raw(server, None, request("POST", "/v1/jobs", submission(job)), *with_more)
    assert answer.status == 201, answer
    row = server.ended(str(answer.body["jobs"][0]["id"]))
    assert row["owner"] == alice.name
    assert row["started_at"], row["message"]
    assert "42" not in output(server, row).split()


def test_the_environment_of_a_client_makes_nobody_else_of_it(server: Server, bob: Account, waiting: Row) -> None:
    """Programs that go by USER, LOGNAME or HOME take whoever sets them for somebody else."""
    told = {"USER": "root", "LOGNAME": "root", "HOME": "/root", "SUDO_USER": "gjlab1", "SUDO_UID": "0"}
    assert run(["sh", "-c", "echo $USER $HOME"], told, user=bob).out == b"root /root\n"
    done = run([str(GPUJOBS), "cancel", str(waiting["id"])], {"GPUJOBS_HOST": server.host, **told}, user=bob)
    assert (done.code, done.out) == (3, b""), done
    assert "gjlab1's" in done.words
