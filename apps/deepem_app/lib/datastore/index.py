"""The table of contents of a datastore, which several processes read and write at once."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from monailabel.datastore.local import LocalDatastoreModel

from deepem.files import atomic_path

logger = logging.getLogger(__name__)

_Stamp = tuple[int, int, int] | None


class Index:
    """``datastore_v2.json``, read again whenever it has changed and swapped in whole.

    While the file is gone or unreadable, what was last read counts, and the next change writes it
    again. The files of images and labels are the truth; all of this can be made from them anew,
    except what is said about them (``info``).
    """

    def __init__(self, file: Path, lock: Path, empty: LocalDatastoreModel):
        self._file = file
        self._lock = FileLock(lock, poll_interval=0.01)  # given back when its holder is killed
        self._latest: tuple[_Stamp, LocalDatastoreModel] = (None, empty)

    def read(self) -> LocalDatastoreModel:
        """What the last writer of any process left. Not to be changed: other threads read it."""
        seen, model = self._latest
        stamp = self._stamp()
        if stamp is None or stamp == seen:
            return model
        try:
            loaded = LocalDatastoreModel.model_validate_json(self._file.read_bytes())
            loaded.base_path = model.base_path
        except FileNotFoundError:
            return model
        except ValueError:
            aside = self._file.with_name(f"{self._file.name}.unreadable")
            shutil.copy2(self._file, aside)
            logger.exception("%s is unreadable; a copy is kept in %s", self._file, aside)
            loaded = model
        self._latest = (stamp, loaded)  # if it was replaced meanwhile, the next look sees that
        return loaded

    @contextmanager
    def changing(self) -> Iterator[LocalDatastoreModel]:
        """Yield the newest state to change; it is written if that changed it and raised nothing.

        Nobody else writes meanwhile, in any process. Its objects are shared with readers: put
        another one in the place of one that changes.
        """
        with self._lock:
            before = self.read()
            model = before.model_copy(update={"objects": dict(before.objects)})
            yield model
            if model != before or self._stamp() is None:
                with atomic_path(self._file) as aside:
                    text = model.model_dump_json(exclude={"base_path"}, indent=2, fallback=str)
                    aside.write_text(text, encoding="utf-8")
                self._latest = (self._stamp(), model)

    def _stamp(self) -> _Stamp:
        try:
            status = self._file.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size
