"""What the datastore has, in the terms of the library. Nothing is written."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from monailabel.interfaces.datastore import Datastore

from deepem.errors import InputError
from deepem.labelled import LabelledStudy, WeakStudy, weak_studies
from deepem.markups import read_label
from deepem.volume import Study, find_studies, series_name
from deepem.weak_labels import Records

logger = logging.getLogger(__name__)

_UNKNOWN = "UNK"  # how MONAI Label's DICOM datastore says that a tag is not there


def labelled_studies(datastore: Datastore) -> list[LabelledStudy]:
    """Every image with a final label. A label that cannot be read is logged and left out."""
    labelled = []
    for pair in datastore.datalist():
        try:
            study = study_of(datastore, series_name(Path(pair["image"])))
            labelled.append(LabelledStudy(study, read_label(Path(pair["label"]))))
        except InputError as error:
            logger.warning("skipped a label: %s", error)
    return labelled


def recorded_studies(
    datastore: Datastore, records: Records
) -> tuple[list[WeakStudy], list[InputError]]:
    """Every image that a record tells of, and what of the records cannot be used."""
    images = set(datastore.list_images())
    studies = {}
    for uid in records.series:
        if uid in images:
            with suppress(InputError):  # a file that is gone; `weak_studies` says so
                studies[uid] = study_of(datastore, uid)
    return weak_studies(records, studies)


def study_of(datastore: Datastore, image: str) -> Study:
    """An image as its DICOM files, if there are any, and with the patient the datastore knows.

    Only the headers of DICOM files say which slice the number in a report means.
    """
    datastore.get_image_uri(image)  # a DICOMweb datastore fetches it now
    info = datastore.get_image_info(image)
    file = Path(info["path"])
    folder = file.with_name(image)
    found = find_studies(folder) if folder.is_dir() else []
    study = next(item for item in [*found, *find_studies(file)] if item.series_uid == image)
    patient = info.get("PatientID", _UNKNOWN)
    return study if patient == _UNKNOWN else replace(study, patient_id=patient)
