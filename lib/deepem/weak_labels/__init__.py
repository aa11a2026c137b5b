"""Weak labels: what records say of nodules, where that is in the patient, and what is wrong."""

from deepem.weak_labels.audit import Audit, audit, check, render
from deepem.weak_labels.nlst import read_nlst, read_nlst_series
from deepem.weak_labels.records import Records
from deepem.weak_labels.reports import parse_report, read_reports
from deepem.weak_labels.slices import (
    DirectionEvidence,
    ScanSlices,
    direction_evidence,
    in_patient_space,
    read_slices,
    slices_of_headers,
    z_lps_mm,
)
from deepem.weak_labels.table import read_weak_labels

__all__ = [
    "Audit",
    "DirectionEvidence",
    "Records",
    "ScanSlices",
    "audit",
    "check",
    "direction_evidence",
    "in_patient_space",
    "parse_report",
    "read_nlst",
    "read_nlst_series",
    "read_reports",
    "read_slices",
    "read_weak_labels",
    "render",
    "slices_of_headers",
    "z_lps_mm",
]
