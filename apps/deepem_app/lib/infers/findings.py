"""What every task does that answers with findings; how they are written is up to each."""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from deepem.nodule import Proposal
from lib.conf import AppConf, probability
from lib.served import Found, ServedDetector, served

_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


class FindingsTask(InferTask):
    """Findings with at least ``score_threshold``, in a file and as ``nodules`` for programs."""

    def __init__(
        self,
        type: InferType,
        labels: dict[str, int],
        description: str,
        detector: ServedDetector,
        conf: AppConf,
        **config: Any,
    ):
        thresholds = dict.fromkeys((conf.score_threshold, *_THRESHOLDS))  # the first is the default
        super().__init__(
            type=type,
            labels=labels,
            dimension=3,
            description=description,
            config={
                "score_threshold": [f"{value:g}" for value in thresholds],
                "store_sr": False,
                **config,
            },
        )
        self._detector = detector
        self._conf = conf

    def is_valid(self) -> bool:
        """Always: Slicer submits boxes only to a server that lists a detector, model or not."""
        return True

    def get_path(self, validate: bool = True) -> str | None:
        """The served model file, for downloads."""
        path = served(self._detector.paths)
        return str(path) if path else None

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """File of findings, best first, and the same findings for programs.

        InputError if the scan or a setting cannot be used, MONAILabelException without a model.
        """
        suffix = self.suffix(request)
        found = self._detector.find(Path(request["image"]))
        findings = self.chosen(request, found)
        handle, file = tempfile.mkstemp(suffix=suffix)
        os.close(handle)
        names = self.write(request, Path(file), findings, found)
        return file, {
            "label_names": names,
            "score_threshold": self._threshold(request),
            "model": found.card.weights_fingerprint,
            "nodules": [_as_json(finding) for finding in findings],
        }

    def chosen(self, request: Mapping[str, Any], found: Found) -> list[Proposal]:
        """The findings that the request asks for."""
        threshold = self._threshold(request)
        return [one for one in found.proposals if one.probability >= threshold]

    def _threshold(self, request: Mapping[str, Any]) -> float:
        return probability(request, "score_threshold", self._conf.score_threshold)

    @abstractmethod
    def suffix(self, request: Mapping[str, Any]) -> str:
        """Of the file that comes back. InputError for one that the request may not have."""

    @abstractmethod
    def write(
        self, request: Mapping[str, Any], file: Path, findings: Sequence[Proposal], found: Found
    ) -> dict[str, int]:
        """Write the findings; returns the names of the labels in the file and their values."""


def _as_json(finding: Proposal) -> dict[str, Any]:
    return {
        "center_lps_mm": list(finding.nodule.center_lps_mm),
        "diameter_mm": finding.nodule.diameter_mm,
        "probability": finding.probability,
    }
