"""Scoring is started when there is something new to look at, and only then."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from monailabel.interfaces.datastore import Datastore

from lib.scoring.nodule_detection import NoduleDetection

logger = logging.getLogger(__name__)

EVERY_S = 5.0


class Keeper:
    """Compares, every few seconds, what was scored with what there is: model, scans, records.

    start: begins a scoring; False if one is running. One that failed is not tried again before
    something has changed.
    """

    def __init__(self, scoring: NoduleDetection, datastore: Datastore, start: Callable[[], bool]):
        self._scoring = scoring
        self._datastore = datastore
        self._start = start
        self._tried: str | None = None

    def watch(self) -> threading.Thread:
        """A thread that looks from now on, until the server ends."""
        thread = threading.Thread(target=self._watch, name="SCORING", daemon=True)
        thread.start()
        return thread

    def look(self) -> bool:
        """Start a scoring if there is reason to; whether it was started."""
        situation = self._scoring.situation(self._datastore)
        if situation is None or situation == self._tried or self._scoring.is_done(situation):
            return False
        if not self._start():
            return False
        self._tried = situation
        return True

    def _watch(self) -> None:
        pause = threading.Event()
        while True:
            try:
                self.look()
            except Exception:  # a PACS that does not answer now may answer later
                logger.warning("could not see whether there is something to score", exc_info=True)
            pause.wait(EVERY_S)
