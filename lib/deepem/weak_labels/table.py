"""The project's own table: ``weak_labels.csv``."""

from __future__ import annotations

import os

from deepem.nodule import ATTENUATIONS, MARGINS, CleanStatement, Lobe, SliceConvention, WeakLabel
from deepem.tables import NO_NODULES, WEAK_LABEL_COLUMNS, WEAK_LABEL_EXTRA_COLUMNS
from deepem.weak_labels.records import Records, Row, collect, read_rows

_FINDING = [
    name
    for name in (*WEAK_LABEL_COLUMNS, *WEAK_LABEL_EXTRA_COLUMNS)
    if name not in ("seriesuid", "lobe", "source")
]
_LOBES = {"": None} | {lobe.value.lower(): lobe for lobe in Lobe}
_CONVENTIONS = {"": None} | {convention.value: convention for convention in SliceConvention}
_ATTENUATIONS = {"": None} | {name: name for name in ATTENUATIONS}
_MARGINS = {"": None} | {name: name for name in MARGINS}


def read_weak_labels(path: str | os.PathLike[str]) -> Records:
    """Read what `deepem.tables.write_weak_labels` writes; an empty field means unknown.

    A slice number without convention is kept as undeclared. A row with ``no nodules`` as its lobe
    and nothing else is a clean scan; a row with a series alone says that a nodule is somewhere.
    ``source`` becomes file and row, then what stood there. InputError when the file or its columns
    cannot be used; rows that cannot are rejected one by one.
    """
    rows, rejected = read_rows(path, WEAK_LABEL_COLUMNS)
    return collect(rows, rejected, _record)


def _record(row: Row) -> WeakLabel | CleanStatement:
    uid = row.required("seriesuid", "a series UID")
    source = ": ".join(filter(None, (row.where, row.text("source"))))
    if row.text("lobe").lower() == NO_NODULES:
        for name in _FINDING:
            if row.text(name):
                raise row.error(name, f"nothing beside {NO_NODULES!r}")
        return CleanStatement(uid, source)
    choices = f"one of {', '.join(lobe.value for lobe in Lobe)}, {NO_NODULES!r}, or nothing"
    lobe = row.one_of("lobe", _LOBES, choices)
    number, z_lps_mm = row.whole("slice_number", 0), row.number("z_lps_mm")
    convention = row.one_of("slice_convention", _CONVENTIONS)
    if number is None and convention:
        raise row.error("slice_number", f"a number in the convention {convention.value}")
    if number is not None and z_lps_mm is not None:
        raise row.error("z_lps_mm", f"nothing beside slice_number {number}")
    sop_instance_uid = row.text("sop_instance_uid") or None
    if sop_instance_uid and not (number is None and z_lps_mm is None):
        raise row.error("sop_instance_uid", "nothing beside another slice")
    if number == 0 and convention is SliceConvention.ONE_AT_HEAD:
        raise row.error("slice_number", "a whole number from 1")
    if number is not None and convention is None:
        convention = SliceConvention.UNDECLARED
    series_number = row.whole("series_number", 0)
    if series_number is not None and convention is not SliceConvention.DICOM_INSTANCE:
        raise row.error("series_number", "nothing without a dicom_instance")
    return WeakLabel(
        uid,
        lobe,
        number,
        convention,
        z_lps_mm,
        row.diameter_mm("diameter_mm"),
        row.one_of("attenuation", _ATTENUATIONS),
        source,
        row.one_of("margin", _MARGINS),
        series_number,
        sop_instance_uid,
    )
