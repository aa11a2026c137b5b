"""Findings as a DICOM Structured Report: TID 1500, Measurement Report, for archives and viewers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from highdicom import sr
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

import deepem
from deepem.dicom.codes import (
    CERTAINTY,
    CT_CHEST,
    DEVICE,
    DIAMETER,
    LOBES,
    LUNG,
    MEASUREMENT_REPORT,
    MILLIMETER,
    NODULE,
    PERCENT,
)
from deepem.dicom.source import Source
from deepem.lungs import Lungs
from deepem.model import ModelCard
from deepem.nodule import Lobe, Proposal
from deepem.observation import LobeModel

SERIES_NUMBER = 302
_SURE = 0.5


def measurement_report(
    findings: Sequence[Proposal], source: Source, lungs: Lungs, card: ModelCard
) -> sr.Comprehensive3DSR:
    """One measurement group (TID 1411) for each finding, in the order given; none is fine.

    A group has the sphere as an ellipsoid in the patient (so its centre is the mean of the six
    points), the nearest slice, the diameter in mm, the score as *Certainty of Finding* in percent,
    and as finding site the lobe that `LobeModel` expects there, or the lung where it is not sure or
    no lungs were found. Observer and algorithm carry version and fingerprint of the model, whose
    ``card`` it is. The UIDs follow from scan, model and findings: the same report is the same
    object, and stays one when it is stored twice.
    """
    what = [source.series_uid, card.weights_fingerprint, repr(list(findings))]
    sites = _sites(findings, lungs)
    groups = [
        _group(number, finding, site, source, card)
        for number, (finding, site) in enumerate(zip(findings, sites, strict=True), start=1)
    ]
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=["DeepEM", card.weights_fingerprint]),
        name="DeepEM",
        manufacturer_name="DeepEM",
        model_name=f"DeepEM {card.deepem_version}",
        serial_number=card.weights_fingerprint,
    )
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(
            observer_device_context=sr.ObserverContext(sr.CodedConcept.from_code(DEVICE), device)
        ),
        procedure_reported=CT_CHEST,
        imaging_measurements=groups,
        title=MEASUREMENT_REPORT,
    )
    return sr.Comprehensive3DSR(
        evidence=source.headers,
        content=report[0],
        series_instance_uid=generate_uid(entropy_srcs=[*what, "series"]),
        series_number=SERIES_NUMBER,
        sop_instance_uid=generate_uid(entropy_srcs=[*what, "report"]),
        instance_number=1,
        manufacturer="DeepEM",
        manufacturer_model_name="DeepEM",
        software_versions=deepem.__version__,
        device_serial_number=card.weights_fingerprint,
        series_description="DeepEM findings (research only)",
        is_complete=True,
    )


def _group(
    number: int, finding: Proposal, site: Code, source: Source, card: ModelCard
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    nodule = finding.nodule
    k = round(source.grid.to_index(np.array(nodule.center_lps_mm))[2])
    nearest = source.headers[min(max(k, 0), len(source.headers) - 1)]
    axes = np.repeat(np.eye(3), 2, axis=0) * np.tile([[-1.0], [1.0]], (3, 1))
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            generate_uid(entropy_srcs=[source.series_uid, card.weights_fingerprint, repr(finding)]),
            f"nodule {number}",
        ),
        referenced_volume_surface=sr.VolumeSurface(
            sr.GraphicTypeValues3D.ELLIPSOID,
            nodule.center_lps_mm + axes * nodule.diameter_mm / 2,
            str(nearest.FrameOfReferenceUID),
            source_images=[
                sr.SourceImageForSegmentation(nearest.SOPClassUID, nearest.SOPInstanceUID)
            ],
        ),
        finding_type=NODULE,
        algorithm_id=sr.AlgorithmIdentification(
            "DeepEM", card.deepem_version, [f"weights {card.weights_fingerprint}"]
        ),
        finding_sites=[sr.FindingSite(site)],
        measurements=[
            sr.Measurement(DIAMETER, round(nodule.diameter_mm, 4), MILLIMETER),
            sr.Measurement(CERTAINTY, round(100 * finding.probability, 4), PERCENT),
        ],
    )


def _sites(findings: Sequence[Proposal], lungs: Lungs) -> list[Code]:
    """The lobe of each finding; lobes with one code (the lingula is left upper lobe) add up."""
    centers = np.reshape([finding.nodule.center_lps_mm for finding in findings], (-1, 3))
    sites = []
    for row in np.exp(LobeModel.anatomical().log_probability(lungs.relative(centers))):
        share = dict.fromkeys(LOBES.values(), 0.0)
        for lobe, p in zip(Lobe, row, strict=True):
            share[LOBES[lobe]] += p
        site = max(share, key=share.__getitem__)
        sites.append(site if lungs.found and share[site] >= _SURE else LUNG)
    return sites
