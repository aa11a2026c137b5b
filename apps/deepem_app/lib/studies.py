"""From the ids of a datastore to what the library reads. Nothing is written."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dicomweb_client import DICOMwebClient
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.datastore import Datastore
from pydicom.dataset import Dataset
from requests import RequestException

from deepem.errors import InputError
from deepem.labelled import LabelledStudy, WeakStudy, usable_labels, weak_studies
from deepem.markups import read_label
from deepem.volume import Study, find_studies, series_name
from deepem.weak_labels import Records, ScanSlices, slices_of_headers

logger = logging.getLogger(__name__)

_UNKNOWN = "UNK"  # how MONAI Label's DICOM datastore says that a tag is not there


def study_of(datastore: Datastore, image: str) -> Study:
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


def labelled_studies(datastore: Datastore) -> list[LabelledStudy]:
    """Every image with a final label. A label that cannot be read is logged and left out."""
    labelled = []
    for pair in datastore.datalist():
        try:
            one = study_of(datastore, series_name(Path(pair["image"])))
            labelled.append(LabelledStudy(one, read_label(Path(pair["label"]))))
        except InputError as error:
            logger.warning("skipped a label: %s", error)
    return labelled


def recorded_studies(
    datastore: Datastore, records: Records
) -> tuple[list[WeakStudy], list[InputError]]:
    """Every image that a record tells of, and what of the records cannot be used.

    From a PACS only the images are fetched whose records its headers bear out.
    """
    images = set(datastore.list_images())
    wanted = [uid for uid in records.series if uid in images]
    if isinstance(datastore, DICOMWebDatastore):
        slices, rejected = pacs_slices(datastore, wanted, records)
        usable, unusable = usable_labels(records, slices)
        weak = [WeakStudy(study_of(datastore, uid), labels) for uid, labels in usable.items()]
        return weak, [*rejected, *unusable]
    studies = {}
    for uid in wanted:
        with suppress(InputError):  # a file that is gone; `weak_studies` says so
            studies[uid] = study_of(datastore, uid)
    return weak_studies(records, studies)


def pacs_slices(
    datastore: DICOMWebDatastore, images: Iterable[str], records: Records
) -> tuple[dict[str, ScanSlices], list[InputError]]:
    """Where the slices of images lie, by the headers that the PACS tells; nothing is fetched.

    A record may name an image of another series of the study: those are asked for only then.
    Second come the images of which the PACS tells nothing usable.
    """
    beside = {
        label.series_uid
        for label in records.labels
        if label.series_number is not None or label.sop_instance_uid is not None
    }
    slices, rejected = {}, []
    for image in images:
        where = f"{datastore.name()}, series {image}"
        try:
            headers = _headers(datastore._client, image, all_series=image in beside)
            slices[image] = slices_of_headers(where, image, headers)
        except InputError as error:
            rejected.append(error)
        except (RequestException, IndexError, KeyError) as error:
            rejected.append(InputError(where, "DICOM headers", "an answer of the PACS", error))
    return slices, rejected


def _headers(client: DICOMwebClient, image: str, all_series: bool) -> list[Dataset]:
    found = client.search_for_series(search_filters={"SeriesInstanceUID": image})[0]
    study_uid = str(Dataset.from_json(found).StudyInstanceUID)
    series = [image]
    if all_series:
        others = client.search_for_series(study_uid, search_filters={"Modality": "CT"})
        series += [str(Dataset.from_json(one).SeriesInstanceUID) for one in others]
    return [
        Dataset.from_json(header)
        for uid in dict.fromkeys(series)
        for header in client.retrieve_series_metadata(study_uid, uid)
    ]
