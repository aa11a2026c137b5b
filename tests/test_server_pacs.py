"""The real server on a real PACS (Orthanc), used from OHIF in a real browser and by its client.

Where Orthanc, a Chromium or Playwright is missing, the tests say so and are skipped.
DEEPEM_SCREENSHOTS: a folder that keeps the pictures of the browser.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
import requests
from monailabel.client import MONAILabelClient
from scipy import ndimage
from serving import copy_app, free_port, serving

from deepem.geometry import Grid
from deepem.nodule import Nodule
from deepem.phantom import Phantom, make_phantom, write_dicom_series

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from environment import SetupError
from orthanc import Orthanc, check_installed, running_orthanc, store

MASK = "nodule_mask"
SCANS = {"head_first": 20, "feet_first": 22, "one_nodule": 31, "clean": 30}
"""Seeds of phantoms in which the shipped model finds every nodule, and hardly anything else."""
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update",
            "--disable-sync")  # fmt: skip
PATIENCE_MS = 120_000

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Site:
    """A PACS with phantoms, and the server on it."""

    pacs: Orthanc
    client: MONAILabelClient
    url: str
    phantoms: dict[str, Phantom]
    cache: Path
    log: Path

    def nodules(self, scan: str) -> list[Nodule]:
        return [item.nodule for item in self.phantoms[scan].nodules]

    def uid(self, scan: str) -> str:
        return self.phantoms[scan].series_uid

    def objects(self, modality: str) -> list[pydicom.Dataset]:
        """Everything of a modality in the PACS, by Orthanc's own interface."""
        query = {"Level": "Instance", "Query": {"Modality": modality}}
        found = requests.post(f"{self.pacs.url}/tools/find", json=query, timeout=30).json()
        files = [requests.get(f"{self.pacs.url}/instances/{one}/file", timeout=30) for one in found]
        return [pydicom.dcmread(io.BytesIO(file.content)) for file in files]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    try:
        check_installed()
    except SetupError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("site")
    phantoms = {scan: make_phantom(seed, "mini") for scan, seed in SCANS.items()}
    cache = root / "cache"
    with running_orthanc(root / "orthanc", free_port()) as pacs:
        for scan, phantom in phantoms.items():
            write_dicom_series(phantom, root / scan, from_feet=scan == "feet_first")
            assert store(pacs, (root / scan).iterdir()) == {}
        variables = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(cache)}
        with serving(copy_app(root / "app"), pacs.dicomweb, root, variables) as running:
            yield Site(pacs, running.client, running.url, phantoms, cache, running.log)


@pytest.fixture(autouse=True)
def server_log(site) -> Iterator[None]:
    """Print what the server said meanwhile, which pytest shows when the test fails."""
    start = site.log.stat().st_size
    yield
    print(site.log.read_text()[start:][-8000:])


# --- OHIF


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no Chromium is installed (Debian, Ubuntu: sudo apt install chromium)")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=program, args=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, site, tmp_path, request):
    """A window whose picture is kept when the test is over, whatever came out."""
    page = browser.new_page(viewport={"width": 1400, "height": 700})
    page.set_default_timeout(PATIENCE_MS)
    yield page
    folder = Path(os.environ.get("DEEPEM_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{request.node.name}.png")
    page.close()


def open_scan(page, site: Site, scan: str) -> None:
    """From the work list to a viewer that has loaded the scan and knows the server."""
    page.goto(f"{site.url}/ohif/")
    page.get_by_role("button", name="Confirm and Hide").click()
    patient = f"phantom-{site.uid(scan)[-12:]}"
    page.locator("span.truncate", has_text=patient).click()
    page.get_by_role("button", name="MONAI Label").click()
    page.wait_for_function(
        "window.cornerstone?.cache.getVolumes().some(volume => volume.loadStatus?.loaded)"
    )
    page.locator("#monailabelServerURL").fill(site.url)
    page.locator(".settingsTable button").click()
    page.get_by_text("Connected to MONAI Label - Successful").wait_for()


def run_model(page, model: str) -> None:
    tab = page.locator(".tab", has=page.get_by_text("Auto-Segmentation", exact=True))
    tab.locator("select").select_option(model)
    tab.get_by_role("button", name="Run").click()
    page.get_by_text("Running Segmentation - Successful").wait_for()


def overlay(page) -> tuple[np.ndarray, Grid]:
    """What the viewer holds as the labelmap over the CT, and where it has put it."""
    held = page.evaluate(
        """() => {
            const volume = window.services.segmentationService.getLabelmapVolume('1');
            const voxels = Array.from(volume.voxelManager.getCompleteScalarDataArray());
            return {
                shape: volume.dimensions, origin: volume.origin, spacing: volume.spacing,
                direction: Array.from(volume.direction),
                drawn: voxels.flatMap((value, at) => value ? [[at, value]] : []),
            };
        }"""
    )
    mask = np.zeros(held["shape"], np.uint8)
    at, value = np.reshape(held["drawn"], (-1, 2)).T.astype(int)
    mask[np.unravel_index(at, held["shape"], order="F")] = value
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(held["direction"], (3, 3)).T * held["spacing"]
    affine[:3, 3] = held["origin"]
    return mask, Grid(affine, mask.shape)


def show(page, nodule: Nodule) -> None:
    """Move all three planes through the nodule, and nearer."""
    page.evaluate(
        """point => {
            for (const viewport of window.cornerstone.getRenderingEngines()[0].getViewports()) {
                viewport.setZoom(1.5);
                viewport.jumpToWorld(point);
                viewport.render();
            }
        }""",
        list(nodule.center_lps_mm),
    )
    page.wait_for_timeout(1500)


@pytest.mark.parametrize("scan", ["head_first", "feet_first"])
def test_ohif_draws_the_findings_on_the_nodules(page, site, scan):
    """Work list, viewer, panel, connect, run: the viewer's own voxels against the truth."""
    open_scan(page, site, scan)
    run_model(page, MASK)
    page.wait_for_function(
        "window.services.segmentationService.getLabelmapVolume('1')"
        ".voxelManager.getCompleteScalarDataArray().some(value => value)"
    )
    mask, grid = overlay(page)
    phantom, nodules = site.phantoms[scan], site.nodules(scan)
    assert mask.shape == phantom.grid.shape
    np.testing.assert_allclose(grid.affine_lps_mm, phantom.grid.affine_lps_mm, atol=1e-3)
    drawn, count = ndimage.label(mask)
    assert count == len(nodules)
    for nodule in nodules:
        index = phantom.grid.to_index(np.array(nodule.center_lps_mm))
        here = drawn == drawn[tuple(np.rint(index).astype(int))]
        assert here.sum() < mask.size / 2, "nothing is drawn at the centre of this nodule"
        offset_mm = (np.argwhere(here).mean(0) - index) * phantom.grid.spacing_mm
        assert np.linalg.norm(offset_mm) < 1.5
        diameter_mm = 2 * (3 / (4 * np.pi) * here.sum() * phantom.grid.spacing_mm.prod()) ** (1 / 3)
        assert diameter_mm == pytest.approx(nodule.diameter_mm, rel=0.25)
    show(page, max(nodules, key=lambda nodule: nodule.diameter_mm))
