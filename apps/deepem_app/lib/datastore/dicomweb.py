"""A PACS that speaks DICOMweb as the place of the scans, with their labels kept here as files."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dicomweb_client import DICOMwebClient
from dicomweb_client.ext.gcp.session_utils import create_session_from_gcp_credentials
from dicomweb_client.session_utils import create_session, create_session_from_user_pass
from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX, DICOMWebDatastore
from monailabel.datastore.local import (
    DataModel,
    ImageLabelModel,
    LocalDatastore,
    LocalDatastoreModel,
)
from monailabel.datastore.utils.convert import binary_to_image, dicom_to_nifti
from monailabel.datastore.utils.dicom import dicom_web_download_series
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.utils.others.generic import md5_digest
from requests import RequestException

from deepem.dicom import nodule_seg, read_source
from deepem.errors import InputError
from deepem.files import atomic_path
from deepem.markups import read_label
from lib.datastore.local import LocalStore
from lib.datastore.pacs import Impatient, Pacs, Seg

logger = logging.getLogger(__name__)

_FINAL = DefaultLabelTag.FINAL.value
_INFO = ("StudyDate", "StudyTime", "Modality", "RetrieveURL", "PatientID", "StudyInstanceUID")
_UNKNOWN = "UNK"  # how MONAI Label says that a tag is not there


class DicomWebStore(LocalStore, DICOMWebDatastore):
    """Scans come from the PACS and are kept in ``folder``; so are the labels, and there they count.

    A final label with nodules is also pushed to the PACS as a SEG. ``seg`` in its info says how
    that went: ``pushed`` (as ``SeriesInstanceUID``), ``none`` to push, or ``waiting``, with the
    reason in ``seg_error``; what waits is tried again after the next label that gets through. A
    scan for which only the PACS has nodules, in a SEG, is labelled too.
    """

    def __init__(
        self,
        client: DICOMwebClient,
        folder: Path,
        search_filter: Mapping[str, Any],
        *,
        fetch_by_frame: bool = False,
        convert_to_nifti: bool = True,
        read_only: bool = False,
    ):
        self._client = client
        self._fetch_by_frame = fetch_by_frame
        self._convert_to_nifti = convert_to_nifti
        self._pacs = Pacs(client, search_filter)
        self._pushing = threading.Lock()
        super().__init__(folder, read_only=read_only)

    # --- what is there

    def list_images(self) -> list[str]:
        """Series of the PACS; those known here while it has not answered yet."""
        return list(self._pacs.listing().series) or list(self._datastore.objects)

    def get_labeled_images(
        self, label_tag: str | None = None, labels: list[str] | None = None
    ) -> list[str]:
        """Series with a final label here, or with a nodule SEG in the PACS."""
        segs = self._pacs.listing().segs
        here = self._datastore.filter_by_tag(_FINAL)
        return [image for image in self.list_images() if image in here or image in segs]

    def get_unlabeled_images(
        self, label_tag: str | None = None, labels: list[str] | None = None
    ) -> list[str]:
        """The other series."""
        labelled = set(self.get_labeled_images())
        return [image for image in self.list_images() if image not in labelled]

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What the PACS says of a series, what was added here, and the ``path`` it is kept at."""
        entry = self._object(self._datastore, image_id)
        return {**entry.image.info, "path": str(self._image_folder / f"{image_id}.nii.gz")}

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Scan and final label as files, fetched if need be. What cannot be fetched is logged."""
        pairs = []
        segs = self._pacs.listing().segs
        for image_id in self.get_labeled_images():
            try:
                label = self.get_label_uri(image_id, _FINAL) or self._fetched_seg(segs[image_id])
                pairs.append({"image": self.get_image_uri(image_id), "label": label})
            except Exception as error:  # whatever one object of the PACS does to a reader of it
                logger.warning("%s: its label is left out: %s", image_id, error)
        return pairs

    def _object(self, index: LocalDatastoreModel, image_id: str) -> ImageLabelModel:
        entry = index.objects.get(image_id)
        series = self._pacs.listing().series.get(image_id)
        if series is None:
            return entry or super()._object(index, image_id)
        info = {tag: str(series.get(tag, None) or _UNKNOWN) for tag in _INFO}
        info["SeriesInstanceUID"] = image_id
        if entry:
            image = entry.image.model_copy(update={"info": {**info, **entry.image.info}})
            return entry.model_copy(update={"image": image})
        return ImageLabelModel(image=DataModel(ext=".nii.gz", info=info))

    @contextmanager
    def _changing(self) -> Iterator[LocalDatastoreModel]:
        self._pacs.listing()  # else the PACS may be asked while all other writers wait
        with super()._changing() as index:
            yield index

    def _scanned_images(
        self, known: Mapping[str, ImageLabelModel], labels: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, DataModel]:
        """All that is known or labelled: a scan that is not fetched yet has no file here."""
        ids = dict.fromkeys(
            [*known, *(image_id for files in labels.values() for image_id in files)]
        )
        return {
            image_id: known[image_id].image if image_id in known else DataModel(ext=".nii.gz")
            for image_id in ids
        }

    # --- scans

    def get_image_uri(self, image_id: str) -> str:
        """The scan as a file, fetched if need be; empty for an unknown one."""
        known = image_id in self._datastore.objects or image_id in self._pacs.listing().series
        if not known:
            return ""
        folder = self._fetched_scan(image_id)
        if not self._convert_to_nifti:
            return str(folder)
        file = folder.with_name(f"{image_id}.nii.gz")
        if not file.exists():
            _move(dicom_to_nifti(str(folder)), file)
        return str(file)

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """The label as a file; empty if there is none here."""
        return LocalDatastore.get_label_uri(self, label_id, label_tag)  # not that of the PACS

    def _fetched_scan(self, image_id: str) -> Path:
        """The folder with the DICOM files of a known scan."""
        folder = self._image_folder.absolute() / image_id
        if not folder.is_dir():
            series = self._pacs.listing().series.get(image_id)
            self._fetch(str(series.StudyInstanceUID) if series else None, image_id, folder)
        return folder

    def _fetched_seg(self, seg: Seg) -> str:
        """The SEG as a labelmap; only its own region, whose place is right."""
        folder = self._image_folder.absolute() / "segs" / seg.series_uid
        file = folder.with_name(f"{seg.series_uid}.nrrd")
        if not file.exists():
            if not folder.is_dir():
                self._fetch(seg.study_uid, seg.series_uid, folder)
            _move(dicom_to_nifti(str(folder), is_seg=True), file)
        return str(file)

    def _fetch(self, study_uid: str | None, series_uid: str, folder: Path) -> None:
        """Download a series, whole or not at all. HTTPException 502 if the PACS does not let us."""
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching_") as aside:
            try:
                dicom_web_download_series(
                    study_uid, series_uid, aside, self._client, self._fetch_by_frame
                )
            except (RequestException, IndexError) as error:
                raise HTTPException(
                    502, f"{self.name()}: no series {series_uid}: {error}"
                ) from error
            files = list(Path(aside).glob("*.dcm"))
            if not files:
                raise HTTPException(502, f"{self.name()}: series {series_uid} is empty")
            whole = Path(aside) / "series"
            whole.mkdir()
            for file in files:
                file.rename(whole / file.name)
            try:
                whole.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise

    # --- labels

    def save_label(
        self,
        image_id: str,
        label_filename: str,
        label_tag: str,
        label_info: Mapping[str, Any] | None,
        label_id: str = "",
    ) -> str:
        """Keep a label here; then send a final one to the PACS, whose answer changes nothing."""
        final = label_tag == _FINAL
        info = {**(label_info or {}), **({"seg": "waiting"} if final else {})}
        if label_filename.endswith(".bin"):  # voxels without a header
            self._object(self._datastore, image_id)
            label_filename = binary_to_image(self.get_image_uri(image_id), label_filename)
            try:
                super().save_label(image_id, label_filename, label_tag, info)
            finally:
                os.unlink(label_filename)
        else:
            super().save_label(image_id, label_filename, label_tag, info)
        if final:
            with self._pushing:
                if self._push(image_id):
                    for other in self._waiting():
                        self._push(other)
        return image_id

    def _waiting(self) -> list[str]:
        labelled = self._datastore.filter_by_tag(_FINAL)
        return [
            image_id
            for image_id, entry in labelled.items()
            if entry.labels[_FINAL].info.get("seg") == "waiting"
        ]

    def _push(self, image_id: str) -> bool:
        """Send the final label to the PACS as a SEG; note in its info how that went.

        Whatever goes wrong, the label is already kept, so nothing is raised. Returns whether there
        is nothing left to do.
        """
        label = self._datastore.label(image_id, _FINAL)
        try:
            nodules = read_label(Path(self.get_label_uri(image_id, _FINAL)))
            outcome = {"seg": "none", "seg_error": ""}
            if nodules:
                seg = nodule_seg(nodules, read_source(self._fetched_scan(image_id)))
                reply = self._client.store_instances([seg])
                if reply.get("FailedSOPSequence"):
                    raise OSError(f"the PACS refused it: {reply.FailedSOPSequence[0]}")
                uid = str(seg.SeriesInstanceUID)
                outcome = {"seg": "pushed", "seg_error": "", "SeriesInstanceUID": uid}
        except InputError as error:  # will be the same next time
            outcome = {"seg": "none", "seg_error": str(error)}
        except Exception as error:
            outcome = {"seg": "waiting", "seg_error": f"{type(error).__name__}: {error}"}
        if outcome["seg_error"]:
            logger.warning("%s: no SEG pushed: %s", image_id, outcome["seg_error"])
        with self._changing() as index:
            now = index.label(image_id, _FINAL)
            if now and label and now.info.get("version") == label.info.get("version"):
                labels = {**index.objects[image_id].labels}
                labels[_FINAL] = now.model_copy(update={"info": {**now.info, **outcome}})
                index.objects[image_id] = index.objects[image_id].model_copy(
                    update={"labels": labels}
                )
        return outcome["seg"] != "waiting"


def open_pacs(address: str) -> DicomWebStore:
    """As MONAI Label's settings say, in the folder where its own datastore would be.

    Nothing is downloaded for it: MONAI Label fetches a program to write SEGs, which fails offline.
    """
    user = settings.MONAI_LABEL_DICOMWEB_USERNAME
    password = settings.MONAI_LABEL_DICOMWEB_PASSWORD
    if "googleapis.com" in address:
        session = create_session_from_gcp_credentials()
    elif user and password:
        session = create_session_from_user_pass(user, password)
    else:
        session = create_session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, Impatient())
    client = DICOMwebClientX(
        url=address,
        session=session,
        qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
        wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
        stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
    )
    client.set_http_retry_params(retry=False)  # else half a minute while someone waits
    cache = settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip()
    root = Path(cache) if cache else Path.home() / ".cache" / "monailabel" / "dicom"
    return DicomWebStore(
        client,
        root / md5_digest(client.base_url),
        settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER,
        fetch_by_frame=settings.MONAI_LABEL_DICOMWEB_FETCH_BY_FRAME,
        convert_to_nifti=settings.MONAI_LABEL_DICOMWEB_CONVERT_TO_NIFTI,
        read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
    )


def _move(made: str, file: Path) -> None:
    """Swap in a file that MONAI Label left in the folder for temporary files."""
    with atomic_path(file) as aside:
        shutil.move(made, aside)
