"""Findings as DICOM objects that refer to the CT they were found in: SEG and SR."""

from deepem.dicom.seg import nodule_seg
from deepem.dicom.source import Source, read_source, write_dicom
from deepem.dicom.sr import measurement_report

__all__ = ["Source", "measurement_report", "nodule_seg", "read_source", "write_dicom"]
