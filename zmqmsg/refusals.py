"""Notices of clients that do not get through to ``serve``."""

import math
import time
from typing import NamedTuple

from zmqmsg.notices import REPEAT_INTERVAL, Notify

CLIENT_LIMIT = 20  # notices within REPEAT_INTERVAL
EXCUSE_TIME = 2.0  # seconds that a client which hung up has to come back and be served
ADDRESS_LIMIT = 1000  # of clients that are remembered
UNIX_CLIENT = "a Unix socket"  # the address of clients whose process is not known


class HungUp(NamedTuple):
    """A client that hung up during the handshake; times by time.monotonic()."""

    accepted_at: float
    hung_up_at: float


class ClientNotices:
    """Notices of clients that do not get through: of each once a minute, and not of too many.

    A client that hung up is reported two seconds later, unless that is explained by then: a client
    at its address was served or reported, or one whose address is not known was served. Several
    threads use it.
    """

    def __init__(self, notify: Notify) -> None:
        from threading import Lock

        self._notify = notify
        self._lock = Lock()  # held for all that follows
        self._given: dict[str, float] = {}  # notices, and when they were given
        self._explained_at: dict[str, float] = {}  # addresses served or reported, and when
        self._unexplained: dict[str, HungUp] = {}  # by address
        self._unknown_served_at = -math.inf  # when a client without an address was served

    def report(self, address: str, notice: str) -> None:
        """Give ``notice``, of a client at ``address``, unless it was given a short time ago."""
        with self._lock:
            self._note_explained(address)
            self._give(notice)

    def report_unless_explained(self, address: str, accepted_at: float) -> None:
        """Report a client that hung up during the handshake, unless it is served or reported soon.

        It may be a ``zmqmsg send`` that looked why it has to wait.
        """
        with self._lock:
            self._unexplained.setdefault(address, HungUp(accepted_at, time.monotonic()))

    def note_served(self, address: str) -> None:
        """Do not tell that a client at ``address`` hung up: it gets through.

        ``address`` is empty for a client whose address is not known.
        """
        with self._lock:
            if not address:
                self._unknown_served_at = time.monotonic()
            elif address.startswith("process "):
                self._note_explained(UNIX_CLIENT)
            else:
                self._note_explained(address)

    def forget(self, notice: str) -> None:
        """Let ``notice`` be given again: its client has got through meanwhile."""
        with self._lock:
            self._given.pop(notice, None)

    def give_due(self) -> None:
        """Report the clients that hung up and did not come back."""
        now = time.monotonic()
        with self._lock:
            for address, client in tuple(self._unexplained.items()):
                if now >= client.hung_up_at + EXCUSE_TIME:
                    del self._unexplained[address]
                    if not self._is_explained(address, client):
                        self._give(not_through(address, "it hung up during the handshake"))

    def _note_explained(self, address: str) -> None:
        if len(self._explained_at) >= ADDRESS_LIMIT:
            self._explained_at.clear()  # at worst, a client is reported once more
        self._explained_at[address] = time.monotonic()

    def _is_explained(self, address: str, client: HungUp) -> bool:
        """Return whether more is known of a client that hung up.

        One at its address was served or reported, not longer than EXCUSE_TIME before it hung up; or
        one without an address was served since it connected.
        """
        known_at = self._explained_at.get(address, -math.inf)
        is_known = known_at >= client.hung_up_at - EXCUSE_TIME
        may_have_been_served = self._unknown_served_at >= client.accepted_at
        return is_known or may_have_been_served

    def _give(self, notice: str) -> None:
        now = time.monotonic()
        self._given = drop_old(self._given, now)
        if notice not in self._given and len(self._given) >= CLIENT_LIMIT:
            notice = "further refusals are not shown for a while"
        if notice not in self._given:
            self._given[notice] = now
            self._notify(notice, "yellow")


def not_through(address: str, reason: str) -> str:
    """Return the notice of a client that does not get through."""
    return f"a client from {address} did not get through: {reason}"


def drop_old(times: dict[str, float], now: float) -> dict[str, float]:
    """Return those of ``times`` that are not older than a minute."""
    return {key: at for key, at in times.items() if now - at < REPEAT_INTERVAL}
