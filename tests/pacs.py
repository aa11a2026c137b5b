"""A PACS in this process: what a DICOMweb client asks, answered from a list of datasets."""

from __future__ import annotations

from pathlib import Path

import pydicom
import requests


class FakePacs:
    """Stands in for the client; `fails` names the methods that do not get through."""

    base_url = "http://127.0.0.1:9/dicom-web"

    def __init__(self, *folders: Path):
        self.datasets = [pydicom.dcmread(file) for folder in folders for file in folder.iterdir()]
        self.fails: set[str] = set()
        self.asked: list[str] = []

    def _ask(self, method: str) -> None:
        self.asked.append(method)
        if method in self.fails:
            raise requests.ConnectionError(f"{method}: no route to the PACS")

    def series(self, **wanted: str) -> dict[str, list[pydicom.Dataset]]:
        found: dict[str, list[pydicom.Dataset]] = {}
        for item in self.datasets:
            if all(item.get(key) == value for key, value in wanted.items()):
                found.setdefault(str(item.SeriesInstanceUID), []).append(item)
        return found

    def search_for_series(self, search_filters):
        self._ask("search")
        answer = []
        for uid, items in self.series(**search_filters).items():
            summary = pydicom.Dataset()
            summary.SeriesInstanceUID, summary.Modality = uid, items[0].Modality
            summary.StudyInstanceUID = items[0].StudyInstanceUID
            summary.PatientID = items[0].PatientID
            answer.append(summary.to_json_dict())
        return answer

    def retrieve_series_metadata(self, study, series):
        self._ask("metadata")
        items = self.series(SeriesInstanceUID=series, StudyInstanceUID=study)[series]
        answer = [item.to_json_dict() for item in items]
        for item in answer:
            item.pop("7FE00010", None)
        return answer

    def retrieve_series(self, study, series):
        items = self.series(SeriesInstanceUID=series, StudyInstanceUID=study)[series]
        for at, item in enumerate(items):
            if at == len(items) // 2:
                self._ask("retrieve")
            yield item

    def store_instances(self, datasets):
        self._ask("store")
        self.datasets += datasets
        return pydicom.Dataset()
