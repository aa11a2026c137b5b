"""The detector that all tasks share: which file is served, and what it finds in a scan."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from monailabel.interfaces.exception import MONAILabelError, MONAILabelException

from deepem.detector import Detector
from deepem.errors import InputError
from deepem.geometry import Grid
from deepem.lungs import Lungs
from deepem.model import ModelCard
from deepem.nodule import Proposal
from deepem.scan import prepare
from deepem.volume import read_volume
from lib.conf import AppConf

logger = logging.getLogger(__name__)


def served(paths: Sequence[Path]) -> Path | None:
    """The last of ``paths`` that is there: the published model before the shipped one."""
    return next((path for path in reversed(paths) if path.is_file()), None)


@dataclass(frozen=True, eq=False)
class Found:
    """All proposals in a scan, best first, with the CT's own grid and the model's card."""

    proposals: list[Proposal]
    grid: Grid
    lungs: Lungs
    card: ModelCard


class ServedDetector:
    """The served detector; it is loaded again when its file has changed.

    The last result is kept: boxes, mask and report of one scan need one look at it. One scan at a
    time, whatever number of requests there is.
    """

    def __init__(self, paths: Sequence[Path], conf: AppConf):
        self.paths = paths
        self._device = conf.device
        self._lock = threading.Lock()
        self._detector: Detector | None = None
        self._loaded: tuple[Path, int] | None = None
        self._last: tuple[object, Found] | None = None
        if conf.preload and served(paths):
            self._current()

    def find(self, image: Path) -> Found:
        """InputError for what is no CT, MONAILabelException without a model."""
        with self._lock:
            detector = self._current()
            key = (detector.card.weights_fingerprint, str(image), _stamp(image))
            if self._last is None or self._last[0] != key:
                volume = read_volume(image)
                scan = prepare(volume)
                proposals = detector.propose(scan)
                self._last = key, Found(proposals, volume.grid, scan.lungs, detector.card)
            return self._last[1]

    def _current(self) -> Detector:
        path = served(self.paths)
        if path is None:
            raise MONAILabelException(
                MONAILabelError.MODEL_IMPORT_ERROR,
                f"there is no model yet: none of {[str(path) for path in self.paths]} exists. "
                "Submit labels and train one.",
            )
        version = (path, path.stat().st_mtime_ns)
        if self._detector is None or self._loaded != version:
            try:
                self._detector = Detector.load(path, self._device)
            except InputError as error:
                raise MONAILabelException(MONAILabelError.MODEL_IMPORT_ERROR, str(error)) from error
            self._loaded = version
            logger.info("serving %s", path)
        return self._detector


def _stamp(image: Path) -> list[tuple[str, int, int]]:
    """Changes when the file, or any file of the folder, does."""
    files = sorted(image.iterdir()) if image.is_dir() else [image]
    states = [(file.name, file.stat()) for file in files if file.exists()]
    return [(name, state.st_mtime_ns, state.st_size) for name, state in states]
