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

import highdicom as hd
import numpy as np
import pydicom
import pytest
import requests
from monailabel.client import MONAILabelClient
from scipy import ndimage
from serving import MODEL, copy_app, ended, free_port, serving, stats, wait_for
from test_server import TRAIN_S, slicer_label

from deepem.geometry import Grid
from deepem.markups import read_markups
from deepem.model import load_model
from deepem.nodule import Nodule
from deepem.phantom import Phantom, make_phantom, write_dicom_series
from deepem.ranking.strategies import DEFAULT
from deepem.ranking.table import read_ranking

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from environment import SetupError
from orthanc import Orthanc, check_installed, running_orthanc, store

MASK = "nodule_mask"
SCANS = {"head_first": 20, "feet_first": 22, "one_nodule": 31, "clean": 30}
"""Seeds of phantoms in which the shipped model finds every nodule, and hardly anything else."""
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update",
            "--disable-sync")  # fmt: skip
LOADED = "window.cornerstone?.cache.getVolumes().some(volume => volume.loadStatus?.loaded)"
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
    models: Path
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
        app = copy_app(root / "app")
        with serving(app, pacs.dicomweb, root, variables) as running:
            models = app / "model"
            yield Site(pacs, running.client, running.url, phantoms, cache, models, running.log)


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
    page.wait_for_function(LOADED)
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


def test_next_sample_in_ohif_opens_the_scan_that_ranks_first(page, site):
    shipped = load_model(site.models / f"pretrained_{MODEL}.pt")[1].weights_fingerprint
    wait_for(
        lambda: site.client.info()["scoring"][MODEL].get("model") == shipped, TRAIN_S, "the ranking"
    )
    ranking = read_ranking(site.models / MODEL / "ranking" / f"{DEFAULT}.csv")
    assert {place.series_uid for place in ranking} == {site.uid(scan) for scan in SCANS}
    (first,) = (scan for scan in SCANS if site.uid(scan) == ranking[0].series_uid)
    other = next(scan for scan in SCANS if scan != first)
    open_scan(page, site, other)
    page.locator(".tab-label", has_text="Active Learning").click()
    page.get_by_role("button", name="Next Sample").click()
    form = page.locator(".nextSampleForm")
    form.get_by_text(site.uid(first)).wait_for()
    page.on("dialog", lambda dialog: dialog.accept())  # "will reload current page"
    form.get_by_role("button", name="OK").click()
    page.wait_for_url(f"**/monai-label?StudyInstanceUIDs={study_uid(site, first)}")
    page.wait_for_function(LOADED)


# --- a client of 3D Slicer's kind


def submit(site: Site, scan: str, folder: Path) -> dict:
    """The true nodules as boxes; returns the server's answer."""
    file = slicer_label(folder, *site.nodules(scan))
    return site.client.save_label(site.uid(scan), str(file), params={"label_info": []})


def study_uid(site: Site, scan: str) -> str:
    files = [one for one in site.objects("CT") if one.SeriesInstanceUID == site.uid(scan)]
    return files[0].StudyInstanceUID


@pytest.mark.parametrize("scan", ["head_first", "feet_first"])
def test_boxes_are_kept_and_the_pacs_has_them_as_a_seg(site, tmp_path, scan):
    answer = submit(site, scan, tmp_path)
    assert answer["seg"] == "pushed", answer
    (kept,) = site.cache.rglob(f"labels/final/{site.uid(scan)}.json")
    for there, nodule in zip(read_markups(kept), site.nodules(scan), strict=True):
        assert there.center_lps_mm == pytest.approx(nodule.center_lps_mm)
        assert there.diameter_mm == pytest.approx(nodule.diameter_mm)
    sent = [one for one in site.objects("SEG")
            if one.ReferencedSeriesSequence[0].SeriesInstanceUID == site.uid(scan)]  # fmt: skip
    seg = max(sent, key=lambda one: (one.ContentDate, one.ContentTime))
    drawn_mm = drawn_lps_mm(seg)
    apart_mm = np.stack([
        np.linalg.norm(drawn_mm - nodule.center_lps_mm, axis=1) - nodule.diameter_mm / 2
        for nodule in site.nodules(scan)
    ])  # fmt: skip
    assert (apart_mm.min(0) < 0.9).all()  # half a diagonal of a voxel
    for nodule, surface_mm in zip(site.nodules(scan), apart_mm, strict=True):
        volume_mm3 = np.pi / 6 * nodule.diameter_mm**3
        assert (surface_mm < 0.9).sum() == pytest.approx(volume_mm3, rel=0.25)  # voxels of 1 mm³
    assert seg.PatientID == f"phantom-{site.uid(scan)[-12:]}"


def drawn_lps_mm(seg: pydicom.Dataset) -> np.ndarray:
    """Where the drawn voxels of a SEG lie, from its own frames alone, (n, 3)."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    axes = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3))
    down_mm, right_mm = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    points = []
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        corner = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        rows, columns = np.nonzero(frame)
        points.append(
            corner + columns[:, None] * right_mm * axes[0] + rows[:, None] * down_mm * axes[1]
        )
    return np.concatenate(points)


def test_a_scan_without_nodules_is_submitted_and_not_offered_again(site, tmp_path):
    assert submit(site, "clean", tmp_path)["seg"] == "none"
    (kept,) = site.cache.rglob(f"labels/final/{site.uid('clean')}.json")
    assert read_markups(kept) == ()
    for strategy in ("first", "random", "random", "random"):
        assert site.client.next_sample(strategy, {}).get("id") != site.uid("clean")


def test_the_report_in_the_pacs_has_the_numbers_of_the_answer(site):
    file, params = site.client.infer(MODEL, site.uid("feet_first"), {"store_sr": True})
    assert len(read_markups(Path(file))) == len(params["nodules"]) == 3
    (stored,) = (one for one in site.objects("SR")
                 if one.SOPInstanceUID == params["sr"]["SOPInstanceUID"])  # fmt: skip
    report = hd.sr.Comprehensive3DSR.from_dataset(stored)
    groups = report.content.get_volumetric_roi_measurement_groups()
    for group, nodule in zip(groups, params["nodules"], strict=True):
        center = np.reshape(group.roi.graphic_data, (6, 3)).mean(0)
        np.testing.assert_allclose(center, nodule["center_lps_mm"], atol=1e-3)
        diameter, certainty = (item.value for item in group.get_measurements())
        assert diameter == pytest.approx(nodule["diameter_mm"], abs=1e-3)
        assert certainty == pytest.approx(100 * nodule["probability"], abs=1e-3)
    for nodule in site.nodules("feet_first"):
        centers = [found["center_lps_mm"] for found in params["nodules"]]
        assert np.linalg.norm(np.subtract(centers, nodule.center_lps_mm), axis=1).min() < 1.5


def test_a_training_learns_from_what_was_submitted(site, tmp_path):
    client = site.client
    for scan in SCANS:
        submit(site, scan, tmp_path)
    assert client.info()["datastore"]["completed"] == len(SCANS)
    assert client.next_sample("first", {}) == {}
    client.train_start(MODEL, {"method": "none", "steps": 4, "seed": 1, "device": "cpu"})
    status = wait_for(lambda: ended(client), TRAIN_S, "the end of the training")
    assert status["status"] == "DONE", "\n".join(status["details"])
    assert "published: CPM" in stats(client)["message"]
