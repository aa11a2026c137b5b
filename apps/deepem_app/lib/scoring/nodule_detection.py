"""Look at every scan with the served model and write the rankings that strategies read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod

from deepem.detector import Detector
from deepem.files import write_json
from deepem.ranking.evidence import ScanEvidence
from deepem.ranking.scoring import EvidenceFile, gather, told_by
from deepem.ranking.strategies import STRATEGIES, rank
from deepem.ranking.table import write_ranking
from deepem.scan import ScanCache
from deepem.volume import Study
from lib.activelearning.ranked import ranking_file
from lib.conf import AppConf
from lib.records import read_records, records_changed
from lib.served import served
from lib.studies import recorded_studies, study_of

logger = logging.getLogger(__name__)

_AT_LEAST_EVERY_S = 30.0
_SHARE_FOR_RANKING = 0.1
"""Rankings are written on the way, so that the first scores are of use; not more time than this."""


class NoduleDetection(ScoringMethod):
    """Runs in a process of its own, which MONAI Label may kill at any moment.

    It reads the datastore and writes only into ``folder``: what the model saw in each scan, which
    the next run takes up, and a table for every strategy. A scan that cannot be read is ranked
    last, with the reason.
    """

    def __init__(self, paths: Sequence[Path], folder: Path, records: str, conf: AppConf):
        super().__init__("Looks at all scans with the served model and ranks them")
        self._paths = paths
        self._folder = folder
        self._records = records
        self._conf = conf

    @property
    def rankings(self) -> Path:
        """Where the tables are."""
        return self._folder / "ranking"

    def info(self) -> dict[str, Any]:
        """With where the scoring is, or how the last one ended."""
        return {**super().info(), **self._state()}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score what is new and rank; returns what `info` tells."""
        with suppress(AttributeError):  # not on Windows
            os.nice(10)  # whoever annotates comes first
        of = self.situation(datastore)
        model = served(self._paths)
        if model is None:
            return self._tell("there is no model yet", of)
        detector = Detector.load(model, self._conf.device)
        evidence = self._folder / "evidence"
        known = EvidenceFile(evidence / f"{detector.card.weights_fingerprint}.jsonl")
        waiting = sorted(datastore.get_unlabeled_images())
        labelled = sorted(set(datastore.list_images()) - set(waiting))
        records = read_records(self._records)
        weak, _ = recorded_studies(datastore, records)
        seen = _Seen(set(labelled))
        studies = _studies([*waiting, *labelled], datastore, seen)
        cache = ScanCache(self._folder / "cache")  # that of the training
        total, written = len(waiting) + len(labelled), 0.0
        due_s = time.monotonic() + _AT_LEAST_EVERY_S
        for study, found in gather(detector, studies, told_by(records, weak), known, cache):
            seen.add(study.series_uid, found)
            if time.monotonic() > due_s:
                written = self._write(seen)
                self._tell(f"{seen.count} of {total} scans", None)
                due_s = time.monotonic() + max(_AT_LEAST_EVERY_S, written / _SHARE_FOR_RANKING)
        self._write(seen)
        for other in evidence.glob("*.jsonl"):
            if other.stem != detector.card.weights_fingerprint:
                other.unlink()
        said = f"{seen.count} scans ranked"
        if seen.failed:
            said += f", {len(seen.failed)} of them last: they cannot be used"
        return self._tell(said, of, model=detector.card.weights_fingerprint)

    def situation(self, datastore: Datastore) -> str | None:
        """All that a ranking depends on but labels, as a hash; None without a model."""
        model = served(self._paths)
        if model is None:
            return None
        images = sorted(datastore.list_images())
        content = (str(model), model.stat().st_mtime_ns, records_changed(self._records), images)
        return hashlib.blake2b(repr(content).encode(), digest_size=12).hexdigest()

    def is_done(self, situation: str) -> bool:
        """Whether the last scoring ended and was of this `situation`."""
        return self._state().get("situation") == situation

    def _write(self, seen: _Seen) -> float:
        """All rankings of what was seen so far; returns the seconds that it took."""
        started = time.monotonic()
        for strategy in STRATEGIES:
            ranking = rank(strategy, seen.waiting, seen.labelled, seen.failed)
            write_ranking(ranking_file(self.rankings, strategy), ranking)
        return time.monotonic() - started

    def _state(self) -> dict[str, Any]:
        file = self.rankings / "state.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _tell(self, message: str, situation: str | None, model: str = "") -> dict[str, Any]:
        logger.info(message)
        state = {"message": message, "situation": situation, "model": model}
        write_json(self.rankings / "state.json", state)
        return state


@dataclass
class _Seen:
    """What a run knows so far. labelled_ids: not ranked, but others may resemble them."""

    labelled_ids: set[str]
    waiting: list[ScanEvidence] = field(default_factory=list)
    labelled: list[ScanEvidence] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.waiting) + len(self.labelled) + len(self.failed)

    def add(self, image: str, found: ScanEvidence | str) -> None:
        if isinstance(found, ScanEvidence):
            (self.labelled if image in self.labelled_ids else self.waiting).append(found)
        elif image not in self.labelled_ids:
            self.failed.append((image, found))


def _studies(images: Sequence[str], datastore: Datastore, seen: _Seen) -> Iterator[Study]:
    """One after the other, since a PACS may send each only now."""
    for image in images:
        try:
            yield study_of(datastore, image)
        except Exception as error:  # one scan must never hold up the others
            logger.warning("%s: not looked at: %s", image, error)
            seen.add(image, str(error) or type(error).__name__)
