"""A PACS with CTs, the server on it, and OHIF in the browser: all on this computer.

python3 scripts/demo_pacs.py              synthetic chests, made on the first call
python3 scripts/demo_pacs.py --dicom DIR  also the DICOM files in a folder of yours
python3 scripts/demo_pacs.py -- --conf key value  what follows -- goes to MONAI Label as it is

Needs the packages orthanc and orthanc-dicomweb of Debian or Ubuntu.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import NoReturn

from environment import ROOT, SetupError, ready_python, run_command, variables
from orthanc import Orthanc, check_installed, running_orthanc, store
from start import APP, check_port, running, split, wait_until_ready

DEMO = ROOT / "demo" / "pacs"
SCANS = DEMO / "scans"

NEXT_STEPS = """
The server is ready: {url}   (the PACS: {pacs})

In a browser, OHIF: {url}/ohif/
  1. Click a patient of the list, then the button "MONAI Label".
  2. On the right, panel "MONAI Label": enter {url} and press the arrow beside it.
  3. Auto-Segmentation > Model nodule_mask > Run draws the findings into the images.
  4. Active Learning > Next Sample opens the scan that ranks first.

In 3D Slicer, module "MONAI Label": the same server. Boxes that are submitted there are kept by
the server, and the PACS gets them as a segmentation (DICOM SEG).

Ctrl-C stops both. Research software: not a medical device, not for clinical use."""


def main(arguments: list[str]) -> NoReturn:
    """Serve until Ctrl-C. SetupError if something is missing or ends by itself."""
    own, passed_on = split(arguments)
    options = _parser().parse_args(own)
    check_installed()
    check_port("127.0.0.1", options.port, "--port")
    check_port("127.0.0.1", options.pacs_port, "--pacs-port")
    if options.port == options.pacs_port:
        raise SetupError(f"--pacs-port {options.pacs_port}: the server is to listen there (--port)")
    for folder in options.dicom:
        if not folder.is_dir():
            raise SetupError(f"--dicom {folder}: no such folder")
    python = ready_python()
    make_scans(python)
    url = f"http://127.0.0.1:{options.port}"
    with running_orthanc(DEMO / "orthanc", options.pacs_port) as pacs:
        for folder in (SCANS, *options.dicom):
            fill(pacs, folder)
        command = [python, "-m", "monailabel.main", "start_server", "--app", APP]
        command += ["--studies", pacs.dicomweb, "--host", "127.0.0.1", "--port", str(options.port)]
        command += ["--conf", "records", SCANS]
        env = variables(python) | {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(DEMO / "server")}
        with running([*command, *passed_on], env) as server:
            wait_until_ready(server, url)
            print(NEXT_STEPS.format(url=url, pacs=pacs.dicomweb), flush=True)
            code = server.wait()
    raise SetupError(f"the server stopped by itself with code {code}: see above")


def make_scans(python: Path) -> None:
    """Four synthetic chests as DICOM, the InstanceNumbers of two from the feet; made once."""
    if (SCANS / "truth.json").is_file():
        return
    print(f"Making four synthetic scans in {SCANS}", flush=True)
    make = [str(python), "-m", "deepem", "phantom", "--dicom", "--seed", "2026"]
    make += ["--out", str(SCANS), "--count", "4"]
    if subprocess.run(make, cwd=ROOT, env=variables(python), check=False).returncode:
        raise SetupError("could not make the synthetic scans: see above")


def fill(pacs: Orthanc, folder: Path) -> None:
    """Send all DICOM files in a folder to the PACS, and say how many."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and _is_dicom(file)]
    refused = store(pacs, files)
    print(f"Images sent to the PACS from {folder}: {len(files) - len(refused)}", flush=True)
    for file, reason in refused.items():
        print(f"  not taken: {file}: {reason}", flush=True)


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(132)[128:] == b"DICM"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo_pacs.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dicom", metavar="DIR", type=Path, nargs="+", default=[])
    parser.add_argument("--port", type=int, default=8000, help="of the server (%(default)s)")
    parser.add_argument("--pacs-port", type=int, default=8042, help="of the PACS (%(default)s)")
    return parser


if __name__ == "__main__":
    run_command(main)
