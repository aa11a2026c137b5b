"""The MONAI Label app: what it serves, and how it answers requests that it cannot serve."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dicomweb_client import DICOMwebClient
from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.config import TaskConfig
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.async_tasks.task import AsyncTask

import deepem
from deepem.errors import InputError
from lib.conf import AppConf, boolean
from lib.configs.nodule_detection import NoduleDetection
from lib.configs.nodule_mask import NoduleMask
from lib.datastore.dicomweb import open_pacs
from lib.datastore.local import LocalStore
from lib.reports import store_report
from lib.scoring import Keeper
from lib.served import ServedDetector
from lib.studies import study_of
from lib.threads import InThreads

MODELS = {"nodule_detection": NoduleDetection, "nodule_mask": NoduleMask}
"""In the order in which clients list them; Slicer preselects the first."""


class DeepEMApp(MONAILabelApp):
    """Pulmonary nodule detection with MONAI Label: detect, correct, submit, train, publish."""

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]):
        conf = dict(conf)
        self._settings = AppConf.parse(conf)
        model_dir = Path(app_dir) / "model"
        published = model_dir / "nodule_detection.pt"
        shipped = model_dir / "pretrained_nodule_detection.pt"
        paths = [shipped, published] if self._settings.use_pretrained_model else [published]
        self._detector = ServedDetector(paths, self._settings)
        self._models: dict[str, TaskConfig] = {}
        for name in _chosen(self._settings.models):
            self._models[name] = MODELS[name]()
            self._models[name].init(
                name, str(model_dir), conf, None, studies=studies, detector=self._detector
            )
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name=f"DeepEM ({deepem.__version__})",
            description="Pulmonary nodule detection in chest CT",
            version=deepem.__version__,
            labels=["nodule"],  # a list: OHIF appends the labels of the models to it
        )
        self._auto_update_scoring = False  # it starts a process for every next sample; see Keeper

    def init_datastore(self) -> Datastore:
        """The app's own datastore for a folder and for DICOMweb; another remote one as it is."""
        if self.studies.startswith(("http://", "https://")):
            return super().init_datastore()
        return LocalStore(
            Path(self.studies),
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def _init_dicomweb_datastore(self) -> Datastore:
        return open_pacs(self.studies)

    def init_infers(self) -> dict[str, InferTask]:
        """One task per model."""
        return {name: model.infer() for name, model in self._models.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        """Of the models that have one. OHIF's *Update Model* starts all of them."""
        if self._settings.skip_trainers:
            return {}
        trainers = {name: model.trainer() for name, model in self._models.items()}
        return {name: trainer for name, trainer in trainers.items() if trainer}

    def init_strategies(self) -> dict[str, Strategy]:
        """Those of the detector; all offer only scans without a final label."""
        if self._settings.skip_strategies:
            return {}
        offered = [model.strategy() for model in self._models.values()]
        return next((strategies for strategies in offered if strategies), {})

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """Of the models that have one."""
        if self._settings.skip_scoring:
            return {}
        methods = {name: model.scoring_method() for name, model in self._models.items()}
        return {name: method for name, method in methods.items() if method}

    def on_init_complete(self) -> None:
        """Called in the server only, before its first request.

        The processes that it starts open the datastore to read: what is to be learned from is not
        written by who learns.
        """
        os.environ["MONAI_LABEL_DATASTORE_READ_ONLY"] = "true"
        super().on_init_complete()
        from monailabel.app import app as server  # importing it makes a server: not above

        server.middleware_stack = InThreads(server.middleware_stack, settings.MONAI_LABEL_API_STR)

        for name, scoring in self._scoring_methods.items():
            Keeper(scoring, self.datastore(), partial(_start_scoring, name)).watch()

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any]:
        """Tell the client who submitted a label whether it went to the PACS too."""
        info = self.datastore().get_label_info(label_id, DefaultLabelTag.FINAL)
        return {key: info[key] for key in ("seg", "seg_error") if info.get(key)}

    def batch_infer(
        self, request: Mapping[str, Any], datastore: Datastore | None = None
    ) -> dict[str, Any]:
        """Detect in many scans. To save what was found is the task, so its process may write."""
        self.datastore().read_only = False
        return super().batch_infer(request, datastore)

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
        if not (known or self._was_uploaded(image)):
            raise HTTPException(
                404, f"image: expected the id of a scan on this server, got {image!r}"
            )
        with _http_errors():
            pacs = _pacs(datastore, known) if boolean(request, "store_sr", False) else None
            path = study_of(datastore, image).path if known else Path(image)
            result = super().infer({**request, "image": str(path)}, datastore)
            if pacs:
                task = self._infers[request["model"]]
                found = self._detector.find(path)
                result["params"]["sr"] = store_report(
                    pacs, path, task.chosen(request, found), found
                )
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


def _pacs(datastore: Datastore, known: bool) -> DICOMwebClient:
    """The client of the PACS that the scan came from; InputError if it did not come from one."""
    if not (known and isinstance(datastore, DICOMWebDatastore)):
        raise InputError("settings", "store_sr", "true only for a scan of a PACS", "true")
    return datastore._client


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
    return [name for name in MODELS if name in names]


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
