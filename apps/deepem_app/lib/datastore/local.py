"""A folder of scans with their labels, which loses nothing whoever writes, scans or is killed."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.datastore.local import (
    DataModel,
    ImageLabelModel,
    LocalDatastore,
    LocalDatastoreModel,
)

from deepem.files import atomic_path
from lib.datastore.index import Index

IMAGES = (".nii.gz", ".nii", ".nrrd", ".mha")
"""Volumes that the library reads; the defaults of MONAI Label have photographs among them."""

LABELS = (*IMAGES, ".json")

VERSIONS = "versions"
_LEFTOVER = re.compile(r"\.[0-9a-f]{8}\..+")  # of a process that was killed while it wrote
_LEFTOVER_S = 3600


class LocalStore(LocalDatastore):
    """Files are the truth: a label counts once it is whole in its place, and the index follows.

    Every writer re-reads the index under a lock that all processes share. What a save replaces is
    kept as ``labels/<tag>/versions/<image>/<number of the save>``, for ever. A store that is
    ``read_only`` is for processes that only learn from it. HTTPException 404 for images and labels
    that are not there, 422 for names that could lead out of the folder.
    """

    def __init__(self, folder: Path, *, auto_reload: bool = False, read_only: bool = False):
        self.read_only = read_only
        # Not super(): of a store with two bases that would be the other one.
        LocalDatastore.__init__(
            self,
            str(folder),
            extensions=[f"*{suffix}" for suffix in IMAGES],
            auto_reload=auto_reload and not read_only,
        )
        if auto_reload and not read_only:
            self._handler.on_moved = self._on_any_event  # how a file comes that was copied whole

    # --- the index: what MONAI Label's own methods read, and how it changes

    @property
    def _datastore(self) -> LocalDatastoreModel:
        return self._index.read()

    @_datastore.setter
    def _datastore(self, empty: LocalDatastoreModel) -> None:
        empty.base_path = self._datastore_path
        self._index = Index(Path(self._datastore_config_path), Path(self._lock_file), empty)

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Nothing: the index looks by itself whether its file has changed."""

    @contextmanager
    def _changing(self) -> Iterator[LocalDatastoreModel]:
        if self.read_only:
            raise PermissionError(f"{self._datastore_path}: this process may only read it")
        with self._index.changing() as index:
            yield index

    def set_name(self, name: str) -> None:
        """Name the datastore."""
        with self._changing() as index:
            index.name = name

    def set_description(self, description: str) -> None:
        """Describe the datastore."""
        with self._changing() as index:
            index.description = description

    # --- images

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What is known of an image, and its ``path``."""
        self._object(self._datastore, image_id)
        return super().get_image_info(image_id)

    def update_image_info(self, image_id: str, info: Mapping[str, Any]) -> None:
        """Add to, or change, what is known of an image."""
        with self._changing() as index:
            old = self._object(index, image_id)
            image = old.image.model_copy(update={"info": {**old.image.info, **info}})
            index.objects[image_id] = old.model_copy(update={"image": image})

    def add_image(
        self, image_id: str | None, image_filename: str, image_info: Mapping[str, Any] | None
    ) -> str:
        """Copy an image into the folder; one that was there is replaced, and keeps its labels."""
        name, suffix = self._to_id(Path(image_filename).name)
        image_id = _checked("image id", image_id or name)
        if suffix not in IMAGES:
            raise HTTPException(422, f"image: expected one of {IMAGES}, got {image_filename!r}")
        with self._changing() as index:
            file = self._image_folder / f"{image_id}{suffix}"
            with atomic_path(file) as aside:
                shutil.copyfile(image_filename, aside)
            old = index.objects.get(image_id)
            if old and old.image.ext != suffix:
                (self._image_folder / f"{image_id}{old.image.ext}").unlink(missing_ok=True)
            index.objects[image_id] = ImageLabelModel(
                image=_data(file, suffix, image_info), labels=old.labels if old else {}
            )
        return image_id

    def remove_image(self, image_id: str) -> None:
        """Delete an image. Its labels are kept among the earlier versions."""
        with self._changing() as index:
            old = self._object(index, image_id)
            for tag in old.labels:
                self._retire(tag, image_id)
            (self._image_folder / f"{image_id}{old.image.ext}").unlink(missing_ok=True)
            del index.objects[image_id]

    # --- labels

    def save_label(
        self,
        image_id: str,
        label_filename: str,
        label_tag: str,
        label_info: Mapping[str, Any] | None,
    ) -> str:
        """Put a label in its place and keep the one that was there. Returns the image's id.

        When this returns, the label is on disk; ``version`` of its info counts the saves.
        """
        tag = _checked("label tag", label_tag)
        suffix = self._to_id(Path(label_filename).name)[1]
        if suffix not in LABELS:
            raise HTTPException(422, f"label: expected one of {LABELS}, got {label_filename!r}")
        with self._changing() as index:
            old = self._object(index, image_id)
            replaced = self._keep(tag, image_id)
            file = self._label_folder(tag) / f"{image_id}{suffix}"
            with atomic_path(file) as aside:
                shutil.copyfile(label_filename, aside)
            for other in replaced:
                if other != file:
                    other.unlink()
            info = {**(label_info or {}), "version": self._number(tag, image_id)}
            labels = {**old.labels, tag: _data(file, suffix, info)}
            index.objects[image_id] = old.model_copy(update={"labels": labels})
        return image_id

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Take a label away. It is kept among the earlier versions."""
        with self._changing() as index:
            old = self._object(index, label_id)
            self._label(old, label_id, label_tag)
            self._retire(label_tag, label_id)
            labels = {tag: label for tag, label in old.labels.items() if tag != label_tag}
            index.objects[label_id] = old.model_copy(update={"labels": labels})

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """What is known of a label; nothing if the image has none."""
        self._object(self._datastore, label_id)
        return super().get_label_info(label_id, label_tag)

    def update_label_info(self, label_id: str, label_tag: str, info: Mapping[str, Any]) -> None:
        """Add to, or change, what is known of a label."""
        with self._changing() as index:
            old = self._object(index, label_id)
            label = self._label(old, label_id, label_tag)
            label = label.model_copy(update={"info": {**label.info, **info}})
            labels = {**old.labels, label_tag: label}
            index.objects[label_id] = old.model_copy(update={"labels": labels})

    def _keep(self, tag: str, image_id: str) -> list[Path]:
        """Copy the label to the earlier versions. Returns its file, or what a killed save left."""
        places = {suffix: self._label_folder(tag) / f"{image_id}{suffix}" for suffix in LABELS}
        files = {suffix: file for suffix, file in places.items() if file.is_file()}
        for suffix, file in files.items():
            number = self._number(tag, image_id)
            with atomic_path(self._versions(tag, image_id) / f"{number:04d}{suffix}") as aside:
                shutil.copy2(file, aside)  # with its date
        return list(files.values())

    def _retire(self, tag: str, image_id: str) -> None:
        for file in self._keep(tag, image_id):
            file.unlink()

    def _number(self, tag: str, image_id: str) -> int:
        """Of the save that comes next, or of the label in place if it is not kept yet."""
        folder = self._versions(tag, image_id)
        kept = [int(file.name.split(".")[0]) for file in folder.glob("[0-9]*")]
        return max(kept, default=0) + 1

    def _versions(self, tag: str, image_id: str) -> Path:
        return self._label_folder(tag) / VERSIONS / image_id

    # --- the folder

    def refresh(self) -> None:
        """Make the index say what lies in the folder."""
        if self.read_only:
            return
        with self._changing() as index:
            self._sweep()
            index.objects = self._scanned(index.objects)

    _reconcile_datastore = refresh  # under this name MONAI Label calls it at the start

    def _on_any_event(self, event: Any) -> None:
        """Scan when a file came or went; the index is no such file."""
        if self._datastore_config_path not in (event.src_path, event.dest_path):
            self.refresh()

    def _scanned(self, known: Mapping[str, ImageLabelModel]) -> dict[str, ImageLabelModel]:
        """All that is there now; what was known about it stays as it was."""
        folder = Path(self._datastore.label_path(None))
        tags = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        labels = {tag: self._label_files(tag) for tag in tags}
        scanned = {}
        for image_id, image in self._scanned_images(known, labels).items():
            old = known[image_id].labels if image_id in known else {}
            found = {}
            for tag, files in labels.items():
                if image_id in files:
                    here = {self._to_id(file.name)[1]: file for file in files[image_id]}
                    newest = max(here, key=lambda suffix: here[suffix].stat().st_mtime_ns)
                    stays = tag in old and old[tag].ext in here
                    found[tag] = old[tag] if stays else _data(here[newest], newest)
            scanned[image_id] = ImageLabelModel(image=image, labels=found)
        return scanned

    def _scanned_images(
        self, known: Mapping[str, ImageLabelModel], labels: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, DataModel]:
        """The image files, those already known first."""
        files = self._files(self._image_folder, IMAGES)
        here = {
            image_id: {self._to_id(file.name)[1]: file for file in found}
            for image_id, found in files.items()
        }
        order = [*(image for image in known if image in here), *sorted(here.keys() - known.keys())]
        images = {}
        for image_id in order:
            suffix, file = next(iter(here[image_id].items()))
            stays = image_id in known and known[image_id].image.ext in here[image_id]
            images[image_id] = known[image_id].image if stays else _data(file, suffix)
        return images

    def _label_files(self, tag: str) -> dict[str, list[Path]]:
        return self._files(self._label_folder(tag), LABELS)

    def _files(self, folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
        """Image id -> its files. Neither hidden ones nor the index are any."""
        files: dict[str, list[Path]] = {}
        if folder.is_dir():
            for file in sorted(folder.iterdir()):
                image_id, suffix = self._to_id(file.name)
                if suffix in suffixes and not file.name.startswith(".") and file.is_file():
                    files.setdefault(image_id, []).append(file)
        return files

    def _sweep(self) -> None:
        """Delete what processes left that were killed while they wrote.

        An earlier version has the date of its label, so a new one may look old while it is written;
        but whoever writes one holds the lock, as this does.
        """
        labels = Path(self._datastore.label_path(None))
        folders = [self._image_folder, *labels.iterdir(), *labels.glob(f"*/{VERSIONS}/*")]
        for folder in filter(Path.is_dir, folders):
            for file in folder.glob(".*"):
                if (
                    _LEFTOVER.fullmatch(file.name)
                    and file.stat().st_mtime < time.time() - _LEFTOVER_S
                ):
                    file.unlink(missing_ok=True)

    def _to_id(self, file: str) -> tuple[str, str]:
        """Image id and suffix of a file name; the suffix is empty if it is of no known kind."""
        suffix = next((suffix for suffix in LABELS if file.endswith(suffix)), "")
        return file[: len(file) - len(suffix)], suffix

    @property
    def _image_folder(self) -> Path:
        return Path(self._datastore.image_path())

    def _label_folder(self, tag: str) -> Path:
        return Path(self._datastore.label_path(tag))

    def _object(self, index: LocalDatastoreModel, image_id: str) -> ImageLabelModel:
        """The entry of an image. Only ids of the index are accepted, so no path gets further."""
        if image_id not in index.objects:
            raise HTTPException(
                404, f"image: expected the id of a scan on this server, got {image_id!r}"
            )
        return index.objects[image_id]

    def _label(self, entry: ImageLabelModel, image_id: str, tag: str) -> DataModel:
        if tag not in entry.labels:
            raise HTTPException(
                404, f"label: expected one of {sorted(entry.labels)} of {image_id}, got {tag!r}"
            )
        return entry.labels[tag]


def _data(file: Path, suffix: str, info: Mapping[str, Any] | None = None) -> DataModel:
    return DataModel(
        ext=suffix, info={**(info or {}), "ts": int(file.stat().st_mtime), "name": file.name}
    )


def _checked(what: str, name: str) -> str:
    """A name that is one file name on every system, and not a hidden one."""
    if not re.fullmatch(r"[^.\x00-\x1f/\\:][^\x00-\x1f/\\:]*", name):
        raise HTTPException(422, f"{what}: expected a name that is no path, got {name!r}")
    return str.__str__(name)
