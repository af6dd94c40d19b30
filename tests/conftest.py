"""What every test may take for granted."""

from __future__ import annotations

import signal

from hypothesis import settings


def pytest_configure() -> None:
    """Set up what holds for all tests.

    Ctrl-C reaches the commands that tests start, also where a shell started the suite in the background.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A slow machine is no mistake of the code: no property is held to a clock.
    settings.register_profile("gpujobs", deadline=None)
    settings.load_profile("gpujobs")
