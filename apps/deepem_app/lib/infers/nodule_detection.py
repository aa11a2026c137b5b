"""Detect nodules in one scan and answer with ROI boxes as 3D Slicer loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferType

from deepem.markups import write_markups
from deepem.nodule import Proposal
from lib.conf import AppConf
from lib.infers.findings import FindingsTask
from lib.served import Found, ServedDetector


class NoduleDetection(FindingsTask):
    """Boxes."""

    def __init__(self, labels: dict[str, int], detector: ServedDetector, conf: AppConf):
        super().__init__(
            InferType.DETECTION,
            labels,
            "Pulmonary nodules in chest CT, as boxes with score and diameter",
            detector,
            conf,
        )

    def suffix(self, request: Mapping[str, Any]) -> str:
        """Slicer loads ``.json`` as markups."""
        return ".json"

    def write(
        self, request: Mapping[str, Any], file: Path, findings: Sequence[Proposal], found: Found
    ) -> dict[str, int]:
        """One ROI box for each finding."""
        write_markups(file, findings)
        return self.labels
