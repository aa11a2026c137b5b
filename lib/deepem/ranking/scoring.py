"""Looking at scans, each once for each model, and keeping what was seen."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from deepem.detector import Detector
from deepem.em import EmConfig
from deepem.errors import InputError
from deepem.explain import explain
from deepem.froc import MAX_MARKS
from deepem.labelled import WeakStudy
from deepem.network import VALUES_PER_ANCHOR
from deepem.nodule import Lobe, Proposal, WeakLabel
from deepem.ranking.evidence import RecordEvidence, ScanEvidence
from deepem.rounds import first_model, to_rows
from deepem.scan import Scan, ScanCache, mirrored
from deepem.volume import Study
from deepem.weak_labels import Records

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Of `EvidenceFile`; a change of what a line means makes old ones unknown."""

_LOBE_NAMES = {
    Lobe.RUL: "right upper lobe",
    Lobe.RML: "right middle lobe",
    Lobe.RLL: "right lower lobe",
    Lobe.LUL: "left upper lobe",
    Lobe.LINGULA: "lingula",
    Lobe.LLL: "left lower lobe",
}


def said(label: WeakLabel) -> str:
    """A record in words, as it is written: ``the right upper lobe, slice 145``."""
    parts = [f"the {_LOBE_NAMES[label.lobe]}"] if label.lobe else []
    if label.slice_number is not None:
        parts.append(f"slice {label.slice_number}")
    elif label.z_lps_mm is not None:
        parts.append(f"z {label.z_lps_mm:.0f} mm")
    return ", ".join(parts) or "a nodule somewhere"


@dataclass(frozen=True)
class Told:
    """The records of one scan: labels in patient space, and the same in words. Empty: clean."""

    labels: tuple[WeakLabel, ...]
    words: tuple[str, ...]


def told_by(records: Records, weak: Sequence[WeakStudy]) -> dict[str, Told]:
    """What ``records`` tell of each scan of ``weak``, which was made from them, by series UID."""
    words = {label.source: said(label) for label in records.labels}
    return {
        item.study.series_uid: Told(
            item.labels, tuple(words[label.source] for label in item.labels)
        )
        for item in weak
    }


def score_scan(
    detector: Detector, scan: Scan, told: Told | None = None, *, flip: bool = True
) -> ScanEvidence:
    """Look at a scan once.

    told: its records, None without any. flip: whether to look at the mirror image too, which takes
    as long again.
    """
    with _pooled(detector.network.head) as pool:
        proposals = detector.propose(scan)[:MAX_MARKS]
    reverse = detector.propose(mirrored(scan))[:MAX_MARKS] if flip else []
    return ScanEvidence(
        scan.series_uid,
        _as_array(proposals),
        _as_array(reverse),
        np.round(pool.mean(), 5),
        None if told is None else _under_model(told, proposals, scan),
    )


def _as_array(proposals: Sequence[Proposal]) -> np.ndarray:
    """(P, 5), rounded to what is kept in a file, so that a resumed ranking is the same."""
    return np.round(np.reshape(to_rows(proposals), (-1, 5)), 3)


def _under_model(
    told: Told, proposals: Sequence[Proposal], scan: Scan
) -> tuple[RecordEvidence, ...]:
    config = EmConfig()
    posterior = explain(
        told.labels, proposals, scan, first_model(config),
        null=config.null, joint=config.joint, odds=config.odds,
    )  # fmt: skip
    rows = zip(told.words, posterior.entropy, posterior.null, strict=True)
    return tuple(RecordEvidence(says, float(h), float(missed)) for says, h, missed in rows)


class _Pool:
    """Sums of features over all cells that a head sees, weighted by the probability of a nodule."""

    def __init__(self) -> None:
        self._sum: np.ndarray | float = 0.0
        self._weight = 0.0

    def add(self, head: nn.Module, inputs: tuple[Tensor, ...], maps: Tensor) -> None:
        """A forward hook: inputs (B, F, I, J, K), maps (B, A * 5, I, J, K)."""
        logit = maps.unflatten(1, (-1, VALUES_PER_ANCHOR))[:, :, 0]
        weight = logit.amax(1, keepdim=True).float().sigmoid()
        self._sum = self._sum + (inputs[0] * weight).sum((0, 2, 3, 4)).double().cpu().numpy()
        self._weight += float(weight.sum())

    def mean(self) -> np.ndarray:
        """(F,)."""
        return np.asarray(self._sum / self._weight)


@contextmanager
def _pooled(head: nn.Module) -> Iterator[_Pool]:
    pool = _Pool()
    handle = head.register_forward_hook(pool.add)
    try:
        yield pool
    finally:
        handle.remove()


class EvidenceFile:
    """Evidence of one model on disk, a line for each scan; half a line does not count.

    Lines are only added, and by one process at a time. A scan is looked at again when its file or
    its records change, one that failed too.
    """

    def __init__(self, path: Path):
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a process was killed while it wrote this line
                    row = json.loads(line)
                    self._rows[row["key"]] = row

    def get(self, key: str) -> ScanEvidence | str | None:
        """What is known: evidence, or why there is none; None for a scan not looked at."""
        row = self._rows.get(key)
        if row is None:
            return None
        return row["error"] if "error" in row else _from_row(row)

    def add(self, key: str, found: ScanEvidence | str) -> None:
        """Keep what was found, or why nothing was."""
        row = {"key": key} | ({"error": found} if isinstance(found, str) else _to_row(found))
        self._rows[key] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            if file.tell() and not self._ends_whole():
                file.write("\n")
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def _ends_whole(self) -> bool:
        with open(self._path, "rb") as file:
            file.seek(-1, 2)
            return file.read() == b"\n"


def gather(
    detector: Detector,
    studies: Iterable[Study],
    told: Mapping[str, Told],
    known: EvidenceFile,
    cache: ScanCache,
    *,
    flip: bool = True,
    keep: bool = False,
) -> Iterator[tuple[Study, ScanEvidence | str]]:
    """Evidence of each scan, or why there is none; only what is not ``known`` is computed.

    keep: whether prepared scans that are not in the cache yet are put there (tens of MB each).
    """
    for study in studies:
        of_scan = told.get(study.series_uid)
        try:
            key = _key(cache.key(study), of_scan, flip)
        except InputError as error:  # its file is gone
            yield study, str(error)
            continue
        found = known.get(key)
        if found is None:
            try:
                found = score_scan(detector, cache.get(study, keep=keep), of_scan, flip=flip)
            except Exception as error:  # one scan must never hold up the others
                found = str(error) or type(error).__name__
                logger.warning("%s: not looked at: %s", study.series_uid, found)
            known.add(key, found)
        yield study, found


def _key(scan: str, told: Told | None, flip: bool) -> str:
    content = repr((_FORMAT, scan, told and (told.labels, told.words), flip))
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


def _to_row(evidence: ScanEvidence) -> dict[str, Any]:
    records = evidence.records
    return {
        "seriesuid": evidence.series_uid,
        "proposals": evidence.proposals.tolist(),
        "mirrored": evidence.mirrored.tolist(),
        "features": evidence.features.tolist(),
        "records": None if records is None else [asdict(record) for record in records],
    }


def _from_row(row: dict[str, Any]) -> ScanEvidence:
    records = row["records"]
    return ScanEvidence(
        row["seriesuid"],
        np.reshape(row["proposals"], (-1, 5)),
        np.reshape(row["mirrored"], (-1, 5)),
        np.array(row["features"]),
        None if records is None else tuple(RecordEvidence(**record) for record in records),
    )
