"""The MONAI Label app: what it serves, and how it answers requests that it cannot serve."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.async_tasks.task import AsyncTask

import deepem
from deepem.errors import InputError
from lib.conf import AppConf
from lib.configs.nodule_detection import NoduleDetection
from lib.scoring import Keeper

MODELS = {"nodule_detection": NoduleDetection}
IMAGES = ["*.nii.gz", "*.nii", "*.nrrd", "*.mha"]
"""Volumes that the library reads; the defaults of MONAI Label have photographs in them."""


class DeepEMApp(MONAILabelApp):
    """Pulmonary nodule detection with MONAI Label: detect, correct, submit, train, publish."""

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]):
        conf = dict(conf)
        self._settings = AppConf.parse(conf)
        self._models = {}
        for name in _chosen(self._settings.models):
            self._models[name] = MODELS[name]()
            model_dir = str(Path(app_dir) / "model")
            self._models[name].init(name, model_dir, conf, planner=None, studies=studies)
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name=f"DeepEM ({deepem.__version__})",
            description="Pulmonary nodule detection in chest CT",
            version=deepem.__version__,
            labels=next(iter(self._models.values())).labels,
        )
        self._auto_update_scoring = False  # it starts a process for every next sample; see Keeper

    def init_datastore(self) -> Datastore:
        """A datastore of the volume formats that the library reads."""
        settings.MONAI_LABEL_DATASTORE_FILE_EXT = IMAGES
        return super().init_datastore()

    def init_infers(self) -> dict[str, InferTask]:
        """One task per model; Slicer preselects the first."""
        return {name: model.infer() for name, model in self._models.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        """One trainer per model; Slicer's progress bar follows the first."""
        if self._settings.skip_trainers:
            return {}
        return {name: model.trainer() for name, model in self._models.items()}

    def init_strategies(self) -> dict[str, Strategy]:
        """Those of the first model; all offer only scans without a final label."""
        if self._settings.skip_strategies:
            return {}
        return next(iter(self._models.values())).strategy()

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """One per model."""
        if self._settings.skip_scoring:
            return {}
        return {name: model.scoring_method() for name, model in self._models.items()}

    def on_init_complete(self) -> None:
        """Called in the server only: the processes that it starts must not write its datastore.

        Each of them opens the datastore, and with a new image in the folder it would write its
        own snapshot back, over a label that was submitted meanwhile.
        """
        os.environ["MONAI_LABEL_DATASTORE_READ_ONLY"] = "true"
        super().on_init_complete()
        for name, scoring in self._scoring_methods.items():
            Keeper(scoring, self.datastore(), partial(_start_scoring, name)).watch()

    def infer(
        self, request: Mapping[str, Any], datastore: Datastore | None = None
    ) -> dict[str, Any]:
        """Detect in one scan. HTTPException with the reason if the request cannot be served.

        MONAI Label loads whatever lies at an id that happens to be a path, and the working
        directory for an id that it does not know; here only scans that were given to it count.
        """
        datastore = datastore or self.datastore()
        image = request["image"]
        known = image in datastore.list_images()
        path = datastore.get_image_uri(image) if known else image
        if not (known or self._was_uploaded(image)) or not os.path.exists(path):
            raise HTTPException(
                404, f"image: expected the id of a scan on this server, got {image!r}"
            )
        with _http_errors():
            result = super().infer({**request, "image": path}, datastore)
        if known and request.get("save_label"):
            tag = request.get("label_tag", DefaultLabelTag.ORIGINAL)
            info = {"model": request["model"], "params": result["params"]}
            result["label"] = datastore.save_label(image, result["file"], tag, info)
        return result

    def _was_uploaded(self, image: Any) -> bool:
        """Whether the path is that of a session's image, or of one sent along with the request."""
        if not isinstance(image, str) or not os.path.isabs(image):
            return False
        path = Path(image).resolve()
        of_session = self.sessions() is not None and path.is_relative_to(
            Path(self.sessions().store_path).resolve()
        )
        with_request = path.parent == Path(tempfile.gettempdir()).resolve()
        return of_session or (with_request and path.name.startswith(tempfile.gettempprefix()))


def _start_scoring(method: str) -> bool:
    """In a process of its own; False if one is running."""
    task, _ = AsyncTask.run("scoring", request={"method": method})
    return task is not None


def _chosen(models: str) -> list[str]:
    """Names of ``--conf models``: ``all``, or some of `MODELS` with commas between."""
    names = list(MODELS) if models == "all" else [name.strip() for name in models.split(",")]
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise InputError("--conf", "models", f"all, or some of {list(MODELS)}", ", ".join(unknown))
    return names


@contextmanager
def _http_errors() -> Iterator[None]:
    """Turn bad input into the status and the text that a client shows."""
    try:
        yield
    except InputError as error:
        raise HTTPException(422, str(error)) from error
    except MONAILabelException as error:
        status = 404 if error.error is MONAILabelError.INVALID_INPUT else 503
        raise HTTPException(status, error.msg) from error
