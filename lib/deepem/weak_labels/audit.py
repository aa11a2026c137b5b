"""The audit of weak labels: what is there, what cannot be used, and what looks wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deepem.errors import InputError
from deepem.nodule import Lobe, WeakLabel
from deepem.volume import Study, find_studies
from deepem.weak_labels.nlst import read_nlst, read_nlst_series
from deepem.weak_labels.records import Records
from deepem.weak_labels.reports import read_reports
from deepem.weak_labels.slices import (
    DirectionEvidence,
    ScanSlices,
    direction_evidence,
    in_patient_space,
    read_slices,
)
from deepem.weak_labels.table import read_weak_labels

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Audit:
    """All that a person should know of weak labels before training with them.

    sources: what every file or folder gave. scans: how many there are; labelled, clean: how many
    of the records' series. by_lobe: labels by lobe name, unknown last. heights: relative heights
    (25, 50, 75 %) of the placed labels by lobe, 0 feet to 1 head. duplicates: pairs of one series
    and lobe, at most one slice apart. missing: series with records but without scan.
    contradictions: series with labels that are called clean as well. direction: the evidence for
    undeclared slice numbers, None when there are none. rejected: rows, and labels that cannot be
    placed.
    """

    sources: Mapping[str, Records]
    scans: int
    labelled: int
    clean: int
    by_lobe: Mapping[str, int]
    heights: Mapping[str, tuple[float, float, float]]
    duplicates: tuple[tuple[WeakLabel, WeakLabel], ...]
    missing: tuple[str, ...]
    contradictions: tuple[str, ...]
    direction: DirectionEvidence | None
    rejected: tuple[InputError, ...]


def audit(sources: Mapping[str, Records], scans: Mapping[str, ScanSlices]) -> Audit:
    """Audit what the readers gave (by file) against the scans that are there (by series UID)."""
    records = Records.merged(sources.values())
    here = [label for label in records.labels if label.series_uid in scans]
    placed, misplaced = in_patient_space(here, scans)
    labelled = {label.series_uid for label in records.labels}
    called_clean = {item.series_uid for item in records.clean}
    heights: dict[str, list[float]] = defaultdict(list)
    for label in placed:
        if label.z_lps_mm is not None:
            heights[_lobe(label)].append(scans[label.series_uid].height(label.z_lps_mm))
    lobes = Counter(map(_lobe, records.labels))
    order = [*(lobe.value for lobe in Lobe), UNKNOWN]
    evidence = direction_evidence(here, scans)
    return Audit(
        sources=sources,
        scans=len(scans),
        labelled=len(labelled),
        clean=len(called_clean),
        by_lobe={name: lobes[name] for name in order},
        heights={
            name: tuple(np.percentile(heights[name], (25, 50, 75)).tolist())
            for name in order
            if heights[name]
        },
        duplicates=tuple(_duplicates(placed, scans)),
        missing=tuple(uid for uid in records.series if uid not in scans),
        contradictions=tuple(uid for uid in records.series if uid in labelled & called_clean),
        direction=evidence if evidence.labels else None,
        rejected=(*records.rejected, *misplaced),
    )


def check(
    studies: Path,
    weak_labels: Path | None = None,
    nlst: Path | None = None,
    nlst_series: Path | None = None,
    reports: Path | None = None,
    on_bad: Callable[[InputError], None] | None = None,
) -> Audit:
    """Read every source that is given, and only headers of the scans that they name; audit them.

    ``on_bad`` gets scans that cannot be read (without it the first one is raised); they count as
    missing. InputError for a source that cannot be read at all, and for a NLST table without its
    table of series.
    """
    sources: dict[str, Records] = {}
    if weak_labels:
        sources[str(weak_labels)] = read_weak_labels(weak_labels)
    if nlst:
        if not nlst_series:
            raise InputError(nlst, "series", "a table pid,study_yr,seriesuid beside it", "none")
        sources[str(nlst)] = read_nlst(nlst, read_nlst_series(nlst_series))
    if reports:
        sources[str(reports)] = read_reports(reports)
    found = {study.series_uid: study for study in find_studies(studies, on_bad)}
    named = Records.merged(sources.values()).series
    wanted = [found[uid] for uid in named if uid in found]
    return audit(sources, dict(_read(wanted, on_bad)))


def render(result: Audit) -> RenderableType:
    """The whole audit for a terminal, or as plain text where there is none."""
    sources = Table("source", "labels", "clean", "rejected", "other", title="Sources")
    for name, records in result.sources.items():
        counts = (records.labels, records.clean, records.rejected)
        sources.add_row(Text(name), *(str(len(items)) for items in counts), str(records.others))
    lobes = Table("lobe", "labels", "25 %", "50 %", "75 %",
                  title="Lobes, and height of their slices (0 feet, 1 head)")  # fmt: skip
    for name, count in result.by_lobe.items():
        quartiles = (f"{value:.2f}" for value in result.heights.get(name, ()))
        lobes.add_row(name, str(count), *quartiles)
    lines = [
        f"{result.labelled} labelled and {result.clean} clean series, {result.scans} of them here"
    ]
    if result.direction:
        lines.append(f"undeclared slice numbers: {result.direction}")
    lines += _listed("missing scans", result.missing)
    lines += _listed("labelled and called clean", result.contradictions)
    lines += _listed("duplicates", [f"{a.source} and {b.source}" for a, b in result.duplicates])
    lines += _listed("rejected", result.rejected)
    return Group(sources, lobes, *(Text(line) for line in lines))


def _listed(title: str, items: Iterable[object]) -> list[str]:
    items = list(items)
    return [f"{title}: {len(items)}", *(f"  {item}" for item in items)]


def _lobe(label: WeakLabel) -> str:
    return label.lobe.value if label.lobe else UNKNOWN


def _duplicates(
    placed: Iterable[WeakLabel], scans: Mapping[str, ScanSlices]
) -> Iterable[tuple[WeakLabel, WeakLabel]]:
    groups: dict[tuple[str, str], list[tuple[float, WeakLabel]]] = defaultdict(list)
    for label in placed:
        if label.z_lps_mm is not None:
            scan = scans[label.series_uid]
            slices = scan.height(label.z_lps_mm) * scan.count
            groups[label.series_uid, _lobe(label)].append((slices, label))
    for group in groups.values():
        for (slice_a, a), (slice_b, b) in combinations(group, 2):
            if abs(slice_a - slice_b) < 1.01:  # heights are rounded
                yield a, b


def _read(
    studies: Iterable[Study], on_bad: Callable[[InputError], None] | None
) -> Iterable[tuple[str, ScanSlices]]:
    for study in studies:
        try:
            yield study.series_uid, read_slices(study)
        except InputError as error:
            if on_bad is None:
                raise
            on_bad(error)
