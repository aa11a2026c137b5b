"""The model ``nodule_detection``: its labels, its files, and the tasks that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monailabel.interfaces.config import TaskConfig
from monailabel.interfaces.tasks.strategy import Strategy

from deepem.ranking.strategies import STRATEGIES
from lib.activelearning import ByName, Desk, Ranked, Rankings
from lib.conf import AppConf
from lib.infers import NoduleDetection as Infer
from lib.scoring import NoduleDetection as Scoring
from lib.served import ServedDetector
from lib.trainers import NoduleDetection as Trainer


class NoduleDetection(TaskConfig):
    """The detector as it is: boxes, and the one that can be trained."""

    def init(
        self, name: str, model_dir: str, conf: dict[str, str], planner: Any, **kwargs: Any
    ) -> None:
        """Settle labels and files. ``conf`` has been checked by the app.

        In ``kwargs``: the ``detector`` that all tasks share, and ``studies``, the folder or address
        of the scans; beside them records are looked for.
        """
        super().init(name, model_dir, conf, planner, **kwargs)
        self.settings = AppConf.parse(conf)
        self.records = self.settings.records or kwargs["studies"]
        self.detector: ServedDetector = kwargs["detector"]
        self.labels = {"nodule": 1}
        self.path = self.detector.paths

    def infer(self) -> Infer:
        """The task that detects."""
        return Infer(self.labels, self.detector, self.settings)

    def trainer(self) -> Trainer:
        """The task that trains."""
        return Trainer(self.path, self._folder, self.records, self.settings)

    def scoring_method(self) -> Scoring:
        """The task that looks at all scans."""
        return Scoring(self.path, self._folder, self.records, self.settings)

    def strategy(self) -> dict[str, Strategy]:
        """By name, all from one desk; the chosen one first.

        It is ``random`` too, since some clients always ask for that.
        """
        rankings = Rankings(self.scoring_method().rankings)
        desk = Desk(60 * self.settings.lease_minutes)
        chosen = self.settings.strategy
        named = {name: name for name in (chosen, *STRATEGIES)} | {"random": chosen}
        ranked: dict[str, Strategy] = {
            name: Ranked(ranking, STRATEGIES[ranking].description, rankings, desk)
            for name, ranking in named.items()
        }
        return ranked | {"first": ByName(desk)}

    @property
    def _folder(self) -> Path:
        return Path(self.model_dir) / self.name
