"""Assembly: builds the server of its parts and runs it."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import json
import logging
import os
import resource
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from gpujobs import init, places
from gpujobs import settings as configuration
from gpujobs.adapters import enginelock
from gpujobs.adapters.accounts import SystemAccounts
from gpujobs.adapters.clock import SteadyClock
from gpujobs.adapters.engine import default_host
from gpujobs.adapters.images import Images
from gpujobs.adapters.logstore import LogStore
from gpujobs.adapters.mounts import Mounts, PlainMounts
from gpujobs.adapters.nvml import Nvml
from gpujobs.adapters.runner import DockerRunner
from gpujobs.adapters.servicemanager import ServiceManager, passed_socket
from gpujobs.adapters.store import Ledger, Store
from gpujobs.core.decide import Host
from gpujobs.core.errors import GpujobsError, InvalidInput, Refused, Unavailable
from gpujobs.core.ports import GpuSource, MountSource, Paths
from gpujobs.service.access import Directory
from gpujobs.service.api import application
from gpujobs.service.attempts import install_init
from gpujobs.service.autostart import address_of, not_made, record_of, record_of_this
from gpujobs.service.door import listen, open_to, protocol
from gpujobs.service.loop import Service
from gpujobs.settings import Settings
from gpujobs.simulated import SimulatedGpus
from gpujobs.simulated import load as load_machine

logger = logging.getLogger("gpujobs")


class HttpServer(uvicorn.Server):
    """uvicorn without signal handlers: ours end it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


def serve(config: Path | None = None, simulate: Path | None = None, speed: float | None = None) -> int:
    """Run a server until SIGTERM or SIGINT; returns its exit code.

    Raises:
        GpujobsError: It cannot start; nothing was changed.
    """
    if speed is not None:
        raise InvalidInput(
            "--speed: not supported by this server", hint="Leave it out: containers run at their own speed."
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    os.umask(0o077)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # connections and logs are many, select() is not used
    return asyncio.run(_serve(config, simulate))


async def _serve(config: Path | None, simulate: Path | None) -> int:
    environ = os.environ
    manager, listener = ServiceManager.of(environ), passed_socket(environ)
    settings = configuration.load(_settings_file(config))
    state = places.server_state(environ)
    address = address_of(environ) if listener is None else Path(listener.getsockname())
    paths = _make_places(state)
    async with AsyncExitStack() as stack:
        stack.enter_context(_one_server(state))
        ended = stack.enter_context(_announced(state, address))
        engine = DockerRunner(default_host(environ), paths.init, paths.nodes)
        stack.callback(engine.close)
        info = await engine.info()
        if engine.filters() is False:
            logger.warning("the Engine runs with iptables off: nothing keeps containers from reaching each other")
        mounts = await _mounts(paths, (state, places.SYSTEM_RUN, Path(info.root or "/var/lib/docker")))
        stack.push_async_callback(mounts.close)
        if simulate is None:
            gpus: GpuSource = Nvml()
            if settings.runtime not in info.runtimes:
                logger.warning("the Engine has no runtime %r: jobs with GPUs will not start", settings.runtime)
            holder = await enginelock.acquire(engine)
            stack.push_async_callback(enginelock.release, engine, holder)
            still_alone: Callable[[], Awaitable[bool]] = partial(enginelock.holds, engine, holder)
        else:
            gpus, still_alone = SimulatedGpus(load_machine(simulate)), _always
        store = Store(state / "state.sqlite")
        stack.callback(store.close)
        await store.change(lambda ledger: ledger.pass_over(_last_logged(paths.logs)))
        service = Service(
            server_id=await store.change(_server_id), settings=settings, paths=paths, store=store, engine=engine,
            images=Images(engine), logs=LogStore(paths.logs, settings.log_head, settings.log_tail), gpus=gpus,
            mounts=mounts, clock=SteadyClock(),
            directory=Directory(None if os.geteuid() == 0 else os.geteuid(), SystemAccounts()),
            host=Host(cpus=float(info.cpus), memory=info.memory), timezone=_timezone(os.environ),
            still_alone=still_alone,
        )  # fmt: skip
        await service.start()
        gc.freeze()  # what was loaded stays: a full collection over it would hold up the loop
        if listener is None:
            listener = listen(address)
            stack.callback(address.unlink, missing_ok=True)  # one that was passed on is the service manager's
        _open(address, settings)
        await _until_stopped(service, listener, address, manager, config)
        ended()
    return 0


def _settings_file(config: Path | None) -> Path | None:
    """The file that the settings are in; None where there is none."""
    if config is not None:
        return config
    return places.SYSTEM_SETTINGS if os.geteuid() == 0 and places.SYSTEM_SETTINGS.exists() else None


def _open(address: Path, settings: Settings) -> None:
    if warning := open_to(address, settings):
        logger.warning("%s", warning)


async def _always() -> bool:
    """A simulated server gives no real GPU away: any number of them may use one Engine."""
    return True


async def _mounts(paths: Paths, forbidden: tuple[Path, ...]) -> MountSource:
    if os.geteuid() != 0:
        return await PlainMounts.start(forbidden=forbidden)
    return await Mounts.start(paths.pins, forbidden=forbidden)


def _server_id(ledger: Ledger) -> str:
    known = ledger.meta("server")
    if known is None:
        known = secrets.token_hex(4)
        ledger.set_meta("server", known)
    return known


def _last_logged(logs: Path) -> int:
    """The highest number of a submission that there are logs of.

    A ledger that was restored does not know the latest ones: their numbers, given again, would show one account's
    output to another.
    """
    return max((int(entry.name) for entry in logs.iterdir() if entry.name.isdecimal()), default=0)


def _timezone(environ: Mapping[str, str]) -> str:
    if zone := environ.get("TZ"):
        return zone
    try:
        target = os.readlink("/etc/localtime")
    except OSError:
        return ""
    return target.partition("zoneinfo/")[2]


async def _until_stopped(
    service: Service, listener: socket.socket, address: Path, manager: ServiceManager, config: Path | None
) -> None:
    loop = asyncio.get_running_loop()
    http = HttpServer(
        uvicorn.Config(
            application(service),
            http=protocol(service.quotas),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=65536,
        )
    )

    def stop() -> None:
        http.should_exit = True
        service.stopped.set()
        service.wake()

    status = f"listening on unix://{address}"
    reload_wanted = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload_wanted.set)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    serving = asyncio.create_task(http.serve(sockets=[listener]), name="http")
    deciding = asyncio.create_task(service.run(), name="loop")
    reloading = _reload_on_request(service, reload_wanted, manager, config, address)
    beside = [asyncio.create_task(reloading, name="reload")]
    if manager.watchdog is not None:
        beside.append(asyncio.create_task(_tell_progress(service, manager, manager.watchdog), name="watchdog"))
    print(status, flush=True)
    manager.ready(status)
    done, _ = await asyncio.wait({serving, deciding}, return_when=asyncio.FIRST_COMPLETED)
    manager.stopping()
    stop()
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    await asyncio.gather(serving, deciding)
    await service.shut_down()
    for task in done:
        task.result()


async def _tell_progress(service: Service, manager: ServiceManager, within: float) -> None:
    """Tell the service manager that the loop decides, twice as often as it wants to hear it, while it does."""
    while True:
        await service.turn()
        manager.alive()
        await asyncio.sleep(within / 2)


async def _reload_on_request(
    service: Service, wanted: asyncio.Event, manager: ServiceManager, config: Path | None, address: Path
) -> None:
    """Read the settings again whenever that is wanted; wrong ones change nothing."""
    status = f"listening on unix://{address}"
    while True:
        await wanted.wait()
        wanted.clear()
        manager.reloading()
        try:
            found = await asyncio.to_thread(lambda: configuration.load(_settings_file(config)))
        except GpujobsError as error:
            told = "".join(f"\n  {problem}" for problem in error.problems)
            logger.error("%s; what held before goes on%s", error, told)
            manager.ready(f"{status}; the settings on disk are wrong: see the log")
            continue
        waiting = service.reload(found)
        try:
            _open(address, service.settings)
        except Unavailable as error:
            logger.error("%s", error)
        logger.info("the settings were read again")
        if waiting:
            logger.warning("changes that wait for a restart of the server: %s", ", ".join(waiting))
        manager.ready(status)


def _make_places(state: Path) -> Paths:
    run = places.SYSTEM_RUN if os.geteuid() == 0 else state
    try:
        for directory in (state, state / "attempts", state / "logs", state / "bin"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (uid := directory.stat().st_uid) != os.geteuid():
                raise Refused(  # who owns it could put other files in the place of ours
                    f"the directory {directory} belongs to uid {uid}, not to this server's",
                    hint="Set GPUJOBS_STATE to a directory of its own.",
                )
            directory.chmod(0o700)
        pins, nodes = run / "pins", run / "nodes"
        run.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            run.chmod(0o755)  # accounts must be able to look whether the system's socket is there
        for directory in (pins, nodes):
            directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise not_made(state, error) from error
    try:
        binary = install_init(init.binary(), state / "bin")
    except FileNotFoundError as error:
        raise Unavailable(str(error)) from error
    return Paths(state=state, attempts=state / "attempts", logs=state / "logs", pins=pins, nodes=nodes, init=binary)


@contextmanager
def _one_server(state: Path) -> Iterator[None]:
    """Hold the lock of a state directory: two servers would both write its ledger."""
    lock = os.open(state / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            record = record_of(state)
            raise Refused(
                f"another server (pid {record.get('pid', '?')}, uid {record.get('uid', '?')}) "
                f"uses the state directory {state}",
                hint="Use that server, or set GPUJOBS_STATE.",
            ) from None
        yield
    finally:
        os.close(lock)


@contextmanager
def _announced(state: Path, address: Path) -> Iterator[Any]:
    """Write down that a server runs here, and, if it ends in order, that it did."""
    path = state / "server.json"
    before = record_of(state)
    record = record_of_this(address)

    def write(content: dict[str, Any]) -> None:
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(content))
        temporary.replace(path)

    write(record)
    try:
        yield lambda: write({**record, "clean": True})
    except GpujobsError:
        write(before or {**record, "clean": True})  # it never served: whatever was true before still is
        raise
