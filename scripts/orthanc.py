"""A PACS on this computer: Orthanc with its DICOMweb plugin. Standard library only."""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from environment import SetupError
from start import DIRECT, running, wait_until_ready

_PLUGINS = ("/usr/share/orthanc/plugins", "/usr/local/share/orthanc/plugins")


@dataclass(frozen=True)
class Orthanc:
    """Where a running one is reached."""

    url: str

    @property
    def dicomweb(self) -> str:
        """What ``--studies`` of the server takes."""
        return f"{self.url}/dicom-web"


def check_installed() -> None:
    """SetupError that names the packages which are missing, in one line."""
    there = {"orthanc": _program(), "orthanc-dicomweb": _plugin()}
    missing = " ".join(package for package, file in there.items() if file is None)
    if missing:
        raise SetupError(f"not installed: {missing} (Debian, Ubuntu: sudo apt install {missing})")


@contextmanager
def running_orthanc(folder: Path, port: int) -> Iterator[Orthanc]:
    """A PACS on the loopback that keeps everything in ``folder``; it ends with the block.

    SetupError if it is not installed or does not start.
    """
    check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    config, log = folder / "orthanc.json", folder / "orthanc.log"
    config.write_text(json.dumps(_config(folder, port), indent=1), encoding="utf-8")
    pacs = Orthanc(f"http://127.0.0.1:{port}")
    with (
        log.open("w") as output,
        running([_program(), config], dict(os.environ), output, "the PACS") as process,
    ):
        try:
            wait_until_ready(process, pacs.dicomweb, "/studies?limit=1", "the PACS")
        except SetupError as error:
            raise SetupError(f"{error}; its log: {log}") from None
        yield pacs


def store(pacs: Orthanc, files: Iterable[Path]) -> dict[Path, str]:
    """Send files to the PACS; returns the reason for every one that it did not take."""
    refused = {}
    for file in files:
        try:
            with DIRECT.open(urllib.request.Request(f"{pacs.url}/instances", file.read_bytes())):
                pass
        except urllib.error.HTTPError as error:
            refused[file] = f"{error.code} {error.reason}"
    return refused


def _program() -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which("Orthanc", path=path)


def _plugin() -> Path | None:
    files = (Path(folder) / "libOrthancDicomWeb.so" for folder in _PLUGINS)
    return next((file for file in files if file.is_file()), None)


def _config(folder: Path, port: int) -> dict:
    return {
        "Name": "DeepEM",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "HttpPort": port,
        "RemoteAccessAllowed": False,  # there are no passwords: for this computer only
        "AuthenticationEnabled": False,
        "DicomServerEnabled": False,
        "Plugins": [str(_plugin())],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
