"""Findings stored in the PACS that the scan came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dicomweb_client import DICOMwebClient
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from requests import RequestException

from deepem.dicom import measurement_report, read_source
from deepem.nodule import Proposal
from lib.served import Found


def store_report(
    pacs: DICOMwebClient, folder: Path, findings: Sequence[Proposal], found: Found
) -> dict[str, str]:
    """Send a DICOM SR to the PACS (STOW-RS); returns the UIDs under which it lies there.

    folder: the DICOM files of the scan. The same findings of the same model are one object,
    however often they are stored. MONAILabelException when the PACS does not take it.
    """
    report = measurement_report(findings, read_source(folder), found.lungs, found.card)
    try:
        reply = pacs.store_instances([report])
    except RequestException as error:
        raise MONAILabelException(
            MONAILabelError.SERVER_ERROR, f"the report was not stored: {error}"
        ) from error
    if reply.get("FailedSOPSequence"):
        reason = reply.FailedSOPSequence[0].get("FailureReason")
        raise MONAILabelException(
            MONAILabelError.SERVER_ERROR, f"the PACS refused the report: failure reason {reason}"
        )
    return {
        "StudyInstanceUID": str(report.StudyInstanceUID),
        "SeriesInstanceUID": str(report.SeriesInstanceUID),
        "SOPInstanceUID": str(report.SOPInstanceUID),
    }
