"""Probes of an endpoint, one after the other, while nobody is ready there."""

import math
import time
from collections.abc import Callable, Iterator

from zmqmsg.background import Background
from zmqmsg.diagnosis import USABLE_OLD_PEER, Finding

PROBE_DELAY = 0.5  # seconds without a ready peer before the first probe
PROBE_INTERVAL = 1.0  # seconds from the end of a probe to the next one


class Prober:
    """Asks again and again, one probe at a time, what stands in the way at an endpoint."""

    def __init__(self, diagnose: Callable[[], Iterator[Finding]], patience: float) -> None:
        """``diagnose``: begins a probe, which yields what it finds.

        ``patience``: seconds before the first probe begins, and then before the interim finding of
        any probe counts. A final finding counts at once.
        """
        self.finding: Finding | None = None  # the last one that counts
        self._old_peer_probed_at = -math.inf  # when the last probe that found an old peer began
        self._diagnose = diagnose
        self._patience = patience
        self._next_probe_at = time.monotonic() + patience
        self._probe: Background | None = None

    def has_found_old_peer_since(self, moment: float) -> bool:
        """Return whether a probe that began after ``moment`` has found a peer of ZMTP 1 or 2."""
        return self._old_peer_probed_at > moment

    def update(self, now: float) -> None:
        """Note what the probe has found, or begin one if that is due."""
        if not self._probe:
            if now >= self._next_probe_at:
                self._probe = Background(self._diagnose())
            return
        is_over = self._probe.is_over()  # first: what it has found is final only then
        if is_over or now >= self._probe.began_at + self._patience:
            self.finding = self._probe.latest
        if is_over:
            if self.finding == USABLE_OLD_PEER:
                self._old_peer_probed_at = self._probe.began_at
            self._next_probe_at = self._probe.ended_at + PROBE_INTERVAL
            self._probe = None
