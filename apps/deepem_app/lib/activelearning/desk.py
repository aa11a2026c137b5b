"""Who has which scan: no two annotators the same one, and what was skipped comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Lease:
    client: str
    until_s: float


class Desk:
    """Hands out scans, each to one client at a time; shared by all strategies and all requests.

    A lease ends with the label, after ``lease_s``, or when its client asks for another scan: then
    the scan was skipped, and waits until everything else has been handed out. Clients that
    give no name share one, so whatever they were given counts as skipped as soon as one of them
    asks again: they get different scans too. A new start of the server forgets all of this.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic):
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}
        self._skipped: dict[str, None] = {}  # in the order in which they were handed out

    def hand_out(
        self, client: str, in_order: Iterable[str], waiting: Collection[str]
    ) -> str | None:
        """The first scan of ``in_order`` for ``client``; None if others have all that are left.

        waiting: all scans without a label; what is not among them is forgotten.
        """
        with self._lock:
            now = self._clock()
            for scan, lease in list(self._leases.items()):
                if scan not in waiting or lease.until_s <= now:
                    del self._leases[scan]
                elif lease.client == client:
                    del self._leases[scan]
                    self._skipped[scan] = None
            self._skipped = {scan: None for scan in self._skipped if scan in waiting}
            free = (one for one in in_order if one not in self._leases and one not in self._skipped)
            chosen = next(free, None) or next(iter(self._skipped), None)
            if chosen is not None:
                self._skipped.pop(chosen, None)
                self._leases[chosen] = _Lease(client, now + self._lease_s)
            return chosen
