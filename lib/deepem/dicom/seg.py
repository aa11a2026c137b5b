"""Nodules as a DICOM Segmentation, for viewers and for datastores that know labels only as SEG."""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd

import deepem
from deepem.dicom.codes import ABNORMAL_STRUCTURE, ARTIFICIAL_INTELLIGENCE, LUNG, NODULE
from deepem.dicom.source import Source
from deepem.errors import InputError
from deepem.masks import nodule_mask
from deepem.model import ModelCard
from deepem.nodule import Nodule

SERIES_NUMBER = 301


def nodule_seg(
    nodules: Sequence[Nodule], source: Source, card: ModelCard | None = None
) -> hd.seg.Segmentation:
    """A SEG with one segment, *Nodule*, and frames only where one is drawn (`nodule_mask`).

    card: of the model that found them; without, a person marked them. InputError when nothing is
    drawn: DICOM has no empty SEG.
    """
    mask = nodule_mask(nodules, source.grid)
    if not mask.any():
        got = f"none of {len(nodules)}" if nodules else "no nodule"
        raise InputError(source.series_uid, "nodules", "one inside the CT for a SEG", got)
    algorithm = None
    if card:
        algorithm = hd.AlgorithmIdentificationSequence(
            "DeepEM",
            ARTIFICIAL_INTELLIGENCE,
            card.deepem_version,
            parameters={"weights": card.weights_fingerprint},
        )
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Nodule",
        segmented_property_category=ABNORMAL_STRUCTURE,
        segmented_property_type=NODULE,
        algorithm_type="AUTOMATIC" if card else "MANUAL",
        algorithm_identification=algorithm,
        anatomic_regions=[LUNG],
    )
    return hd.seg.Segmentation(
        source_images=source.headers,
        pixel_array=mask.transpose(2, 1, 0),  # frames, rows (j), columns (i)
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        series_instance_uid=hd.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="DeepEM",
        manufacturer_model_name="DeepEM",
        software_versions=deepem.__version__,
        device_serial_number=card.weights_fingerprint if card else "none",
        content_label="NODULES",
        series_description="DeepEM nodules",
    )
