"""Detect nodules in one scan and answer with ROI boxes as 3D Slicer loads them."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from deepem.detector import Detector
from deepem.errors import InputError
from deepem.markups import write_markups
from deepem.nodule import Proposal
from deepem.volume import read_volume
from lib.conf import AppConf, probability
from lib.served import served

logger = logging.getLogger(__name__)

_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


class NoduleDetection(InferTask):
    """The served detector; it is loaded again when its file has changed."""

    def __init__(self, paths: Sequence[Path], labels: dict[str, int], conf: AppConf):
        thresholds = dict.fromkeys((conf.score_threshold, *_THRESHOLDS))  # the first is the default
        super().__init__(
            type=InferType.DETECTION,
            labels=labels,
            dimension=3,
            description="Pulmonary nodules in chest CT, as boxes with score and diameter",
            config={"score_threshold": [f"{value:g}" for value in thresholds]},
        )
        self._paths = paths
        self._conf = conf
        self._detector: Detector | None = None
        self._loaded: tuple[Path, int] | None = None
        if conf.preload and served(paths):
            self._current_detector()

    def is_valid(self) -> bool:
        """Always: Slicer submits boxes only to a server that lists a detector, model or not."""
        return True

    def get_path(self, validate: bool = True) -> str | None:
        """The served model file, for downloads."""
        path = served(self._paths)
        return str(path) if path else None

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """File of markups, best first, and the same findings for programs.

        InputError if the scan or a setting cannot be used, MONAILabelException without a model.
        """
        threshold = probability(request, "score_threshold", self._conf.score_threshold)
        detector = self._current_detector()
        proposals = detector.detect(read_volume(request["image"]))
        findings = [proposal for proposal in proposals if proposal.probability >= threshold]
        handle, file = tempfile.mkstemp(suffix=".json")
        os.close(handle)
        write_markups(Path(file), findings)
        return file, {
            "label_names": self.labels,
            "score_threshold": threshold,
            "model": detector.card.weights_fingerprint,
            "nodules": [_as_json(finding) for finding in findings],
        }

    def _current_detector(self) -> Detector:
        path = served(self._paths)
        if path is None:
            raise MONAILabelException(
                MONAILabelError.MODEL_IMPORT_ERROR,
                f"there is no model yet: none of {[str(path) for path in self._paths]} exists. "
                "Submit labels and train one.",
            )
        version = (path, path.stat().st_mtime_ns)
        if self._detector is None or self._loaded != version:
            try:
                self._detector = Detector.load(path, self._conf.device)
            except InputError as error:
                raise MONAILabelException(MONAILabelError.MODEL_IMPORT_ERROR, str(error)) from error
            self._loaded = version
            logger.info("serving %s", path)
        return self._detector


def _as_json(finding: Proposal) -> dict[str, Any]:
    return {
        "center_lps_mm": list(finding.nodule.center_lps_mm),
        "diameter_mm": finding.nodule.diameter_mm,
        "probability": finding.probability,
    }
