"""From the id of an image to what the library reads."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.datastore import Datastore

from deepem.volume import Study, find_studies

_UNKNOWN = "UNK"  # how MONAI Label's DICOM datastore says that a tag is not there


def study(datastore: Datastore, image: str) -> Study:
    """An image of the datastore, with the patient that the datastore knows.

    What comes from a PACS is read from its DICOM files. They say what the NIfTI file that MONAI
    Label makes of them does not: which slice a number in a report means, that the gantry was
    tilted, that slices are missing. InputError for a file that is gone.
    """
    if isinstance(datastore, DICOMWebDatastore):
        with suppress(RuntimeError):  # no NIfTI to be made of it: reading it will say why
            datastore.get_image_uri(image)  # fetches it
    info = datastore.get_image_info(image)
    file = Path(info["path"])
    if isinstance(datastore, DICOMWebDatastore):
        one = Study(image, file.with_name(image), image)
    else:
        (one,) = find_studies(file)
    patient = info.get("PatientID", _UNKNOWN)
    return one if patient == _UNKNOWN else replace(one, patient_id=patient)
