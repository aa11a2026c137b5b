"""What lies in a PACS: its CT series and the nodule SEGs that refer to them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dicomweb_client import DICOMwebClient
from pydicom import Dataset
from requests import RequestException
from requests.adapters import HTTPAdapter

logger = logging.getLogger(__name__)

FRESH_S = 30.0
"""So long a list of series is taken for granted: new ones appear within it."""

TIMEOUT_S = (5.0, 60.0)
"""For the connection, and between two pieces of an answer."""


@dataclass(frozen=True)
class Seg:
    """A segmentation of nodules in one CT series."""

    series_uid: str
    study_uid: str
    of_series: str
    made: str  # ContentDate and ContentTime


@dataclass(frozen=True)
class Listing:
    """Series UID -> what a query says of it, and CT series UID -> its newest `Seg`."""

    series: Mapping[str, Dataset] = field(default_factory=dict)
    segs: Mapping[str, Seg] = field(default_factory=dict)


class Impatient(HTTPAdapter):
    """Gives up on a PACS that takes no connection, or says nothing any more."""

    def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Send with `TIMEOUT_S` unless the caller has one."""
        kwargs["timeout"] = kwargs.get("timeout") or TIMEOUT_S
        return super().send(request, *args, **kwargs)


class Pacs:
    """Asks a PACS again when its last answer is older than `FRESH_S`; counts on it when it fails.

    Only SEGs with a segment that is called a nodule say that a scan is labelled: others, say of the
    lungs, say nothing of nodules.
    """

    def __init__(self, client: DICOMwebClient, search_filter: Mapping[str, Any]):
        self._client = client
        self._filter = dict(search_filter)
        self._listing = Listing()
        self._asked_s = float("-inf")
        self._asking = threading.Lock()
        self._known_segs: dict[str, Seg | None] = {}  # None: not of nodules

    def listing(self) -> Listing:
        """The newest there is. While one thread asks, the others have the one before."""
        if time.monotonic() - self._asked_s > FRESH_S and self._asking.acquire(
            blocking=self._asked_s == float("-inf")
        ):
            try:
                if time.monotonic() - self._asked_s > FRESH_S:
                    self._listing = Listing(self._series(), self._segs())
            except (RequestException, OSError) as error:
                logger.warning("%s does not answer: %s", self._client.base_url, error)
            finally:
                self._asked_s = time.monotonic()
                self._asking.release()
        return self._listing

    def _search(self, search_filter: Mapping[str, Any]) -> dict[str, Dataset]:
        found = self._client.search_for_series(search_filters=dict(search_filter))
        series = [Dataset.from_json(item) for item in found]
        return {str(item.SeriesInstanceUID): item for item in series}

    def _series(self) -> dict[str, Dataset]:
        found = self._search(self._filter)
        return {uid: item for uid, item in found.items() if set(uid) <= set("0123456789.")}

    def _segs(self) -> dict[str, Seg]:
        for uid, item in self._search({"Modality": "SEG"}).items():
            if uid not in self._known_segs:
                try:
                    self._known_segs[uid] = self._seg(uid, str(item.StudyInstanceUID))
                except (RequestException, AttributeError, IndexError) as error:
                    logger.warning("SEG %s cannot be used: %s", uid, error)
                    self._known_segs[uid] = None
        segs = sorted(filter(None, self._known_segs.values()), key=lambda seg: seg.made)
        return {seg.of_series: seg for seg in segs}

    def _seg(self, uid: str, study_uid: str) -> Seg | None:
        header = Dataset.from_json(self._client.retrieve_series_metadata(study_uid, uid)[0])
        names = [str(segment.SegmentLabel).lower() for segment in header.SegmentSequence]
        if not any("nodule" in name for name in names):
            return None
        made = f"{header.get('ContentDate', '')}{header.get('ContentTime', '')}"
        of_series = str(header.ReferencedSeriesSequence[0].SeriesInstanceUID)
        return Seg(uid, study_uid, of_series, made)
