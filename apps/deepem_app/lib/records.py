"""Where records of nodules are looked for, beside the scans or elsewhere."""

from __future__ import annotations

from pathlib import Path

from deepem.weak_labels import Records, read_reports, read_weak_labels

TABLE, REPORTS = "weak_labels.csv", "reports"


def read_records(where: str) -> Records:
    """Of a table, or of a folder with `TABLE`, a folder `REPORTS` of texts, or both, or neither.

    An address has no folder, hence no records. InputError for a table or a folder of reports that
    is there and cannot be read.
    """
    path = Path(where)
    if path.is_file():
        return read_weak_labels(path)
    table, reports = path / TABLE, path / REPORTS
    return Records.merged([
        *([read_weak_labels(table)] if table.exists() else []),
        *([read_reports(reports)] if reports.exists() else []),
    ])  # fmt: skip


def records_changed(where: str) -> list[tuple[str, int]]:
    """Files that `read_records` would read, each with the time of its last change in ns."""
    path = Path(where)
    found = [path] if path.is_file() else [path / TABLE, *sorted((path / REPORTS).glob("*"))]
    return [(str(file), file.stat().st_mtime_ns) for file in found if file.is_file()]
