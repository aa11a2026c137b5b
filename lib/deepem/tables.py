"""CSV tables in and out: annotations, predictions, scan lists, patients, weak labels.

Columns and frame are LUNA16's: series UID, centre in LPS mm, diameter in mm. Readers ignore columns
that they do not know, accept a header alone as an empty table, and raise `InputError` with the line
of the file for everything that they cannot use.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from deepem.errors import InputError
from deepem.files import atomic_path
from deepem.nodule import MAX_DIAMETER_MM, CleanStatement, Nodule, Proposal, WeakLabel

ANNOTATION_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
PREDICTION_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "probability", "diameter_mm")
PATIENT_COLUMNS = ("seriesuid", "patient_id")
WEAK_LABEL_COLUMNS = (
    "seriesuid",
    "lobe",
    "slice_number",
    "slice_convention",
    "z_lps_mm",
    "diameter_mm",
    "attenuation",
    "source",
)
WEAK_LABEL_EXTRA_COLUMNS = ("margin", "series_number", "sop_instance_uid")
"""Written only where some label has them."""

NO_NODULES = "no nodules"
"""Stands in the column ``lobe`` of a row that says that the scan has none."""

TYPICAL_DIAMETER_MM = 6.4
"""Stands in where a prediction has no diameter: the median of the 1186 nodules of LUNA16."""

EXCLUDED_DIAMETER_MM = 10.0
"""Stands for diameter -1 in LUNA16's excluded findings, as in its official evaluation."""

LOGIT_OF_0, LOGIT_OF_1 = -746.0, 37.0
"""The logits nearest to 0 whose logistic is exactly 0 and 1 in double precision."""

_PathLike = str | os.PathLike[str]
_Value = TypeVar("_Value")


def read_annotations(path: _PathLike) -> dict[str, list[Nodule]]:
    """Nodules by series UID, in the order of the file; InputError where it cannot be used."""
    table = _read(path, ANNOTATION_COLUMNS)
    return _by_series(table, _nodules(table, path, _diameters(table, path)))


def read_excluded(path: _PathLike) -> dict[str, list[Nodule]]:
    """LUNA16's findings that count neither as nodule nor as error; diameter -1 becomes 10 mm."""
    table = _read(path, ANNOTATION_COLUMNS)
    diameter = _numbers(table, path, "diameter_mm")
    unknown = diameter == -1
    expected = f"-1 or a number of mm in (0, {MAX_DIAMETER_MM:g}]"
    valid = unknown | ((diameter > 0) & (diameter <= MAX_DIAMETER_MM))
    _require(valid, table, path, "diameter_mm", expected)
    diameter[unknown] = EXCLUDED_DIAMETER_MM
    return _by_series(table, _nodules(table, path, diameter))


def read_predictions(path: _PathLike) -> dict[str, list[Proposal]]:
    """Proposals by series UID, in the order of the file; InputError where it cannot be used.

    The column ``diameter_mm`` may be missing: every diameter is then `TYPICAL_DIAMETER_MM`.
    Probabilities become logits without clipping inside (0, 1): equal ones stay equal and different
    ones keep their order (they meet only where the digits of a double end, a relative 1e-14 apart);
    exactly 0 and 1 lie beyond all others and come back as 0 and 1.
    """
    table = _read(path, PREDICTION_COLUMNS[:-1])
    probability = _numbers(table, path, "probability")
    valid = (probability >= 0) & (probability <= 1)
    _require(valid, table, path, "probability", "a number in [0, 1]")
    if "diameter_mm" in table:
        diameter = _diameters(table, path)
    else:
        diameter = np.full(len(table), TYPICAL_DIAMETER_MM)
    with np.errstate(divide="ignore"):
        logit = np.log(probability) - np.log1p(-probability)
    logit = logit.clip(LOGIT_OF_0, LOGIT_OF_1).tolist()
    return _by_series(table, map(Proposal, _nodules(table, path, diameter), logit))


def read_series(path: _PathLike) -> list[str]:
    """Series UIDs, one per line, with or without the header ``seriesuid``; each once."""
    rows = _read_rows(path)
    if rows.shape[1] != 1:
        raise InputError(path, "seriesuid", "one series UID per line", f"{rows.shape[1]} columns")
    rows.columns = pd.Index(["seriesuid"])
    if rows["seriesuid"].iloc[0].lower() == "seriesuid":
        rows = rows.iloc[1:]
    _require_distinct(rows, path)
    return rows["seriesuid"].tolist()


def write_series(path: _PathLike, series: Iterable[str]) -> None:
    """Write what `read_series` reads: for example the scans that were read completely."""
    _write(path, ("seriesuid",), [(uid,) for uid in series])


def read_patients(path: _PathLike) -> dict[str, str]:
    """Patient of every series; both stay text."""
    table = _read(path, PATIENT_COLUMNS)
    _require((table["patient_id"] != "").to_numpy(), table, path, "patient_id", "an ID")
    _require_distinct(table, path)
    return dict(zip(table["seriesuid"], table["patient_id"], strict=True))


def write_annotations(path: _PathLike, annotations: Mapping[str, Sequence[Nodule]]) -> None:
    """Write what `read_annotations` reads, with every digit."""
    rows = [
        (uid, *nodule.center_lps_mm, nodule.diameter_mm)
        for uid, nodules in annotations.items()
        for nodule in nodules
    ]
    _write(path, ANNOTATION_COLUMNS, rows)


def write_predictions(path: _PathLike, predictions: Mapping[str, Sequence[Proposal]]) -> None:
    """Write what `read_predictions` reads, with every digit, the best of each series first."""
    rows = [
        (uid, *proposal.nodule.center_lps_mm, proposal.probability, proposal.nodule.diameter_mm)
        for uid, proposals in predictions.items()
        for proposal in sorted(proposals, key=lambda proposal: -proposal.logit)
    ]
    _write(path, PREDICTION_COLUMNS, rows)


def write_weak_labels(
    path: _PathLike, labels: Iterable[WeakLabel], clean: Iterable[CleanStatement] = ()
) -> None:
    """Write weak labels, then clean scans; an empty field means unknown."""
    records = [
        {
            "seriesuid": label.series_uid,
            "lobe": label.lobe and label.lobe.value,
            "slice_number": label.slice_number,
            "slice_convention": label.slice_convention and label.slice_convention.value,
            "z_lps_mm": label.z_lps_mm,
            "diameter_mm": label.diameter_mm,
            "attenuation": label.attenuation,
            "source": label.source,
            "margin": label.margin,
            "series_number": label.series_number,
            "sop_instance_uid": label.sop_instance_uid,
        }
        for label in labels
    ]
    records += [
        {"seriesuid": item.series_uid, "lobe": NO_NODULES, "source": item.source} for item in clean
    ]
    extra = [
        name
        for name in WEAK_LABEL_EXTRA_COLUMNS
        if any(record.get(name) is not None for record in records)
    ]
    columns = (*WEAK_LABEL_COLUMNS, *extra)
    _write(path, columns, [tuple(record.get(name) for name in columns) for record in records])


def _write(path: _PathLike, columns: Sequence[str], rows: Sequence[tuple]) -> None:
    # As objects, because pandas would turn a column of whole numbers with gaps into 3.0, 4.0, ...
    table = pd.DataFrame(rows, columns=list(columns), dtype=object)
    with atomic_path(path) as aside:
        table.to_csv(aside, index=False, lineterminator="\n")


def read_lines(path: _PathLike) -> list[tuple[int, list[str]]]:
    """Fields, as text, of every line that is not blank, with its number in the file; at least one.

    InputError when the file cannot be read as CSV.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise csv.Error("binary data")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except FileNotFoundError:
        raise InputError(path, "file", "a CSV file", "no such file") from None
    except OSError as error:
        raise InputError(path, "file", "a readable CSV file", error.strerror) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, "file", "a CSV file", error) from error
    lines = [(number, fields) for number, fields in lines if any(fields)]
    if not lines:
        raise InputError(path, "file", "a CSV file", "an empty file")
    return lines


def _read_rows(path: _PathLike) -> pd.DataFrame:
    """The file as text: one row per line that is not blank, indexed by its number in the file."""
    lines = read_lines(path)
    width = len(lines[0][1])
    for number, fields in lines:
        if len(fields) > width:
            raise InputError(f"{path}, row {number}", "fields", f"at most {width}", len(fields))
    numbers, rows = zip(*lines, strict=True)
    return pd.DataFrame(list(rows), index=list(numbers), dtype=object).fillna("")


def _read(path: _PathLike, columns: Sequence[str]) -> pd.DataFrame:
    """A table with a header that holds ``columns``; every row names its series."""
    rows = _read_rows(path)
    header = rows.iloc[0].tolist()
    if missing := [name for name in columns if name not in header]:
        raise InputError(path, "header", f"the columns {', '.join(missing)}", ", ".join(header))
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        raise InputError(path, "header", "every column once", f"{', '.join(repeated)} repeated")
    table = rows.iloc[1:]
    table.columns = pd.Index(header)
    _require((table["seriesuid"] != "").to_numpy(), table, path, "seriesuid", "a series UID")
    return table


def _require(
    valid: np.ndarray, table: pd.DataFrame, path: _PathLike, column: str, expected: str
) -> None:
    """InputError for the first row that is not valid, with the text that stands in the file."""
    if not valid.all():
        row = int(np.argmin(valid))
        text = table[column].iloc[row]
        raise InputError(f"{path}, row {table.index[row]}", column, expected, text or "nothing")


def _require_distinct(table: pd.DataFrame, path: _PathLike) -> None:
    once = ~table["seriesuid"].duplicated().to_numpy()
    _require(once, table, path, "seriesuid", "every series once")


def _numbers(table: pd.DataFrame, path: _PathLike, column: str) -> np.ndarray:
    """(rows,) finite numbers of one column."""

    def number(text: str) -> float:
        try:
            return float(text)  # exact to the last digit, unlike pandas' own parser
        except ValueError:
            return np.nan

    values = np.array([number(text) for text in table[column]], dtype=np.float64)
    _require(np.isfinite(values), table, path, column, "a finite number")
    return values


def _diameters(table: pd.DataFrame, path: _PathLike) -> np.ndarray:
    diameter = _numbers(table, path, "diameter_mm")
    valid = (diameter > 0) & (diameter <= MAX_DIAMETER_MM)
    expected = f"a number of mm in (0, {MAX_DIAMETER_MM:g}]"
    _require(valid, table, path, "diameter_mm", expected)
    return diameter


def _nodules(table: pd.DataFrame, path: _PathLike, diameter_mm: np.ndarray) -> list[Nodule]:
    axes = [_numbers(table, path, column).tolist() for column in ("coordX", "coordY", "coordZ")]
    return list(map(Nodule, zip(*axes, strict=True), diameter_mm.tolist()))


def _by_series(table: pd.DataFrame, values: Iterable[_Value]) -> dict[str, list[_Value]]:
    groups: dict[str, list[_Value]] = {}
    for uid, value in zip(table["seriesuid"], values, strict=True):
        groups.setdefault(uid, []).append(value)
    return groups
