"""The model ``nodule_mask``: the detector's findings for viewers that show only masks."""

from __future__ import annotations

from typing import Any

from monailabel.interfaces.config import TaskConfig

from deepem.masks import BANDS
from lib.conf import AppConf
from lib.infers import NoduleMask as Infer


class NoduleMask(TaskConfig):
    """It has no weights of its own, hence no trainer."""

    def init(
        self, name: str, model_dir: str, conf: dict[str, str], planner: Any, **kwargs: Any
    ) -> None:
        """As for `NoduleDetection`. OHIF shows only values that ``labels`` name."""
        super().init(name, model_dir, conf, planner, **kwargs)
        self.settings = AppConf.parse(conf)
        self.detector = kwargs["detector"]
        self.labels = {"nodule": 1, **{band: value for band, (value, _) in BANDS.items()}}
        self.path = self.detector.paths

    def infer(self) -> Infer:
        """The task that draws."""
        return Infer(self.labels, self.detector, self.settings)

    def trainer(self) -> None:
        """None: training ``nodule_detection`` is enough."""
