"""The NLST table "Spiral CT Abnormalities": what readers of the trial noted of every nodule.

Codes are those of the trial's data dictionary (National Lung Screening Trial, NEJM 2011).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from deepem.errors import InputError
from deepem.nodule import Lobe, SliceConvention, WeakLabel
from deepem.weak_labels.records import Records, Row, collect, read_rows

COLUMNS = ("pid", "study_yr", "sct_ab_desc", "sct_epi_loc", "sct_slice_num")

_NODULE, _SIX_OR_MORE = "51", "62"
_SLICE_MISSING = 999
_NO_ANSWER = ("", "m", "n", ".m", ".n", ".")  # as the trial's exports write missing values
_LOBES = {
    "1": Lobe.RUL, "2": Lobe.RML, "3": Lobe.RLL, "4": Lobe.LUL, "5": Lobe.LINGULA, "6": Lobe.LLL
}  # fmt: skip
_ATTENUATIONS = {
    "1": "solid", "2": "ground_glass", "3": "part_solid",
    "4": None, "6": None, "7": None, "9": None,  # fluid, fat, other, unknown
}  # fmt: skip
_MARGINS = {"1": "spiculated", "2": "smooth", "3": "poorly_defined", "9": None}


def read_nlst(
    path: str | os.PathLike[str],
    series: Mapping[tuple[str, str], str],
    convention: SliceConvention = SliceConvention.ONE_AT_HEAD,
) -> Records:
    """Nodules of 4 mm and more (code 51) of the abnormality table.

    series: (pid, study_yr) -> series UID, of `read_nlst_series`; the table names no series.
    convention: how the slices are counted; the trial's readers counted from the head.
    Other abnormalities are only counted (`Records.others`). Rejected are nodules without one of
    the six lobes or without slice (999), "six or more" (code 62) as they have no place, and
    studies without series. InputError when the file or its columns cannot be used.
    """
    rows, rejected = read_rows(path, COLUMNS)

    def label(row: Row) -> WeakLabel | None:
        code = row.required("sct_ab_desc", "a code")
        if code == _SIX_OR_MORE:
            raise row.error("sct_ab_desc", f"{_NODULE}, one nodule with its place")
        if code != _NODULE:
            return None
        lobe = row.one_of("sct_epi_loc", _LOBES, "a lobe from 1 to 6")
        number = row.whole("sct_slice_num", 1)
        if number is None or number == _SLICE_MISSING:
            raise row.error("sct_slice_num", "a slice number (999 stands for missing)")
        pid, year = row.text("pid"), row.text("study_yr")
        if (pid, year) not in series:
            study = f"a series for pid {pid}, study_yr {year}"
            raise InputError(row.where, "pid", study, "none in the table of series")
        axes = [row.diameter_mm(name) for name in ("sct_long_dia", "sct_perp_dia")]
        known = [axis for axis in axes if axis is not None]
        return WeakLabel(
            series[pid, year],
            lobe,
            number,
            convention,
            diameter_mm=sum(known) / len(known) if known else None,
            attenuation=row.one_of("sct_pre_att", {"": None} | _ATTENUATIONS),
            margin=row.one_of("sct_margins", {"": None} | _MARGINS),
            source=row.where,
        )

    return collect(map(_cleaned, rows), rejected, label)


def read_nlst_series(path: str | os.PathLike[str]) -> dict[tuple[str, str], str]:
    """(pid, study_yr) -> series UID, of a CSV file ``pid,study_yr,seriesuid``, each study once.

    InputError for the first row that cannot be used: a wrong series would move labels silently.
    """
    rows, rejected = read_rows(path, ("pid", "study_yr", "seriesuid"))
    if rejected:
        raise rejected[0]
    series: dict[tuple[str, str], str] = {}
    for row in rows:
        uid = row.required("seriesuid", "a series UID")
        study = (row.required("pid", "an ID"), row.required("study_yr", "a study year"))
        if study in series:
            raise InputError(row.where, "pid", "every study once", ", ".join(study))
        series[study] = uid
    return series


def _cleaned(row: Row) -> Row:
    """The row with ``51.0`` as ``51`` and all spellings of a missing value as an empty field."""
    fields = {
        name: "" if text.lower() in _NO_ANSWER else text.removesuffix(".0")
        for name, text in row.fields.items()
    }
    return Row(row.where, fields)
