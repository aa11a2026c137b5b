"""Strategies that hand out scans in the order of the rankings that scoring has written."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from deepem.errors import InputError
from deepem.ranking.strategies import Ranked as Place
from deepem.ranking.table import read_ranking
from lib.activelearning.desk import Desk

logger = logging.getLogger(__name__)

_ANONYMOUS = ""


class Rankings:
    """The rankings in ``folder``, one table for each strategy, read again only when it changed.

    Those that are there are read at once, so that the first who asks does not wait for it.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._read: dict[str, tuple[int, dict[str, Place]]] = {}
        for file in folder.glob(ranking_file(folder, "*").name):
            self.of(file.stem)

    def of(self, strategy: str) -> Mapping[str, Place]:
        """Every scan that was scored, by id, in order; empty before the first scoring."""
        file = ranking_file(self._folder, strategy)
        try:
            written = file.stat().st_mtime_ns
            if strategy not in self._read or self._read[strategy][0] != written:
                places = {place.series_uid: place for place in read_ranking(file)}
                self._read[strategy] = written, places
        except FileNotFoundError:
            return {}
        except InputError as error:
            logger.warning("no ranking: %s", error)
            return {}
        return self._read[strategy][1]


def ranking_file(folder: Path, strategy: str) -> Path:
    """Where scoring writes and `Rankings` reads."""
    return folder / f"{strategy}.csv"


class Ranked(Strategy):
    """Next is the best scan of a ranking that nobody has labelled and nobody has at hand.

    Scans that are not scored yet come after the scored ones, in an order that means nothing and
    never changes; those that cannot be read come last.
    """

    def __init__(self, strategy: str, description: str, rankings: Rankings, desk: Desk):
        super().__init__(description)
        self._strategy = strategy
        self._rankings = rankings
        self._desk = desk

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Id, rank, score and why of a scan for ``client_id``; None when there is none left."""
        waiting = _waiting(request, datastore)
        places = self._rankings.of(self._strategy)
        image = self._desk.hand_out(_client(request), _in_order(places, waiting), waiting)
        if image is None:
            return None
        place = places.get(image)
        if place is None:
            return {"id": image, "rank": None, "score": None, "why": "not scored yet"}
        return {"id": image, "rank": place.rank, "score": place.score, "why": place.why}


class ByName(Strategy):
    """Next is the first scan by its id: for people who go through a folder as it is."""

    def __init__(self, desk: Desk):
        super().__init__("Scans by name")
        self._desk = desk

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """As `Ranked`, without rank and score."""
        waiting = _waiting(request, datastore)
        image = self._desk.hand_out(_client(request), sorted(waiting), waiting)
        if image is None:
            return None
        return {"id": image, "rank": None, "score": None, "why": "the first by name"}


def _waiting(request: Mapping[str, Any], datastore: Datastore) -> set[str]:
    return set(datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels")))


def _client(request: Mapping[str, Any]) -> str:
    """The name that a client gives, or one for all that give none."""
    return str(request.get("client_id") or _ANONYMOUS)


def _in_order(places: Mapping[str, Place], waiting: set[str]) -> Iterator[str]:
    """Only as much as is asked for: usually the first will do."""
    failed = []
    for image, place in places.items():
        if image in waiting:
            if place.score is None:
                failed.append(image)
            else:
                yield image
    yield from sorted(waiting - places.keys(), key=_hash)
    yield from failed


def _hash(image: str) -> str:
    """Names often follow the date or the place; whoever labels the first of them sees only one."""
    return hashlib.blake2b(image.encode()).hexdigest()
