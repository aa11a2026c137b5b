"""The detector with the shipped model: arithmetic and windows must not change its findings."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from deepem import detector as detector_module
from deepem.detector import Detector, network_input, propose
from deepem.geometry import Grid
from deepem.lungs import Lungs
from deepem.model import load_model
from deepem.network import PRESETS, NoduleNet, fused, mixed_precision, pick_device
from deepem.phantom import make_phantom
from deepem.scan import Scan, prepare
from deepem.volume import Volume, find_studies, read_volume

SHIPPED = Path(__file__).parent.parent / "apps/deepem_app/model/pretrained_nodule_detection.pt"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(5, nodule_count=4)


@pytest.fixture(scope="module")
def scan(phantom):
    return prepare(Volume(phantom.hu, phantom.grid, "phantom"))


@pytest.fixture(scope="module")
def shipped():
    return load_model(SHIPPED)[0]


def assert_same_findings(found, expected, *, center_mm, probability):
    """Every confident finding of one list is in the other."""
    for one, other in ((found, expected), (expected, found)):
        centers = np.array([p.nodule.center_lps_mm for p in other])
        for proposal in one:
            if proposal.probability < 0.3:
                continue
            distance_mm = np.linalg.norm(centers - proposal.nodule.center_lps_mm, axis=1)
            nearest = other[int(distance_mm.argmin())]
            assert distance_mm.min() < center_mm
            assert abs(nearest.probability - proposal.probability) < probability


def test_the_shipped_model_finds_most_nodules_of_new_phantoms():
    detector = Detector.load(SHIPPED, "cpu")
    hits = nodules = false = 0
    for seed in range(7000, 7006):
        phantom = make_phantom(seed, nodule_count=3)
        findings = detector.detect(Volume(phantom.hu, phantom.grid, "a"))
        findings = [p for p in findings if p.probability >= 0.5]
        centers = np.array([p.nodule.center_lps_mm for p in findings]).reshape(-1, 3)
        used = np.zeros(len(findings), bool)
        for item in phantom.nodules:
            distance_mm = np.linalg.norm(centers - item.nodule.center_lps_mm, axis=1)
            inside = distance_mm < item.nodule.diameter_mm / 2
            hits += inside.any()
            used |= inside
        nodules += len(phantom.nodules)
        false += int((~used).sum())
    assert hits / nodules > 0.4, (hits, nodules, false)
    assert false <= 8 * 6, (hits, nodules, false)


def test_findings_come_best_first_and_do_not_overlap(shipped, scan):
    found = propose(shipped, scan, CPU)
    logits = [p.logit for p in found]
    assert logits == sorted(logits, reverse=True) and min(logits) > -3
    assert len(found) > 1
    for at, one in enumerate(found):
        for other in found[at + 1 :]:
            gap = np.abs(np.subtract(one.nodule.center_lps_mm, other.nodule.center_lps_mm))
            a, b = one.nodule.diameter_mm, other.nodule.diameter_mm
            overlap = np.prod(np.clip(np.minimum((a + b) / 2 - gap, min(a, b)), 0, None))
            assert overlap / (a**3 + b**3 - overlap) <= 0.1 + 1e-4


def test_bfloat16_gives_the_boxes_of_float32(shipped, scan, monkeypatch):
    """Runs in whatever arithmetic the processor has, and in bfloat16 even if only emulated."""
    found = {}
    for enabled in (True, False):
        monkeypatch.setattr(
            "deepem.detector.mixed_precision",
            lambda device, on=enabled: torch.autocast("cpu", torch.bfloat16, enabled=on),
        )
        found[enabled] = propose(shipped, scan, CPU)
    assert_same_findings(found[True], found[False], center_mm=1.0, probability=0.1)


def test_windows_give_the_boxes_of_one_pass(shipped, scan, monkeypatch):
    whole = propose(shipped, scan, CPU)
    monkeypatch.setattr(detector_module, "_WINDOW", 96)
    assert max(scan.image.shape) > 96
    assert_same_findings(propose(shipped, scan, CPU), whole, center_mm=1.0, probability=0.15)


@pytest.mark.parametrize("shape", [(12, 10, 6), (40, 8, 40)])
def test_a_scan_smaller_than_the_overlap_of_windows_is_searched(shipped, shape, rng):
    hu = rng.integers(-1000, 400, shape).astype(np.int16)
    grid = Grid.axis_aligned(np.zeros(3), 1.0, shape)
    assert isinstance(propose(shipped, prepare(Volume(hu, grid, "tiny")), CPU), list)


@pytest.mark.parametrize("size", [*range(16, 400, 16)])
def test_windows_step_by_whole_cells_and_cover_every_axis(size):
    window = detector_module._window(size)
    assert window % 16 == 0 and window <= max(224, 16)
    step = int(window * (1 - (32 - 0.01) / window))
    assert window == size or step % 4 == 0
    assert window == size or step == window - 32


@pytest.mark.parametrize("preset", PRESETS)
def test_folding_the_norms_changes_nothing(preset):
    torch.manual_seed(0)
    net = NoduleNet(PRESETS[preset]).train()
    x = torch.rand(2, net.channels, 48, 48, 48)
    net(x)  # running statistics that are not the initial ones
    with torch.no_grad():
        before = net.eval()(x)
        torch.testing.assert_close(fused(net)(x), before, rtol=1e-3, atol=1e-4)
    assert before.shape == (2, 5 * len(net.config.anchors_mm), 12, 12, 12)


def test_what_lies_outside_a_scan_is_soft_tissue_and_coordinates_follow_the_lungs():
    grid = Grid.axis_aligned(np.array([100.0, 0, 0]), 1.0, (4, 4, 4))
    lungs = Lungs(
        np.ones((4, 4, 4), bool), grid, np.array([100.0, 0, 0]), np.array([104.0, 2, 8]), True
    )
    scan = Scan("a", np.full((4, 4, 4), 255, np.uint8), grid, lungs, "")
    x = network_input(scan, np.array([-2, 0, 2]), (4, 4, 4), 4)
    assert x.shape == (4, 4, 4, 4)
    assert (x[0, 2:, :, :2] == 1).all()
    np.testing.assert_allclose(x[0, :2], 170 / 255, rtol=1e-6)
    np.testing.assert_allclose(x[0, :, :, 2:], 170 / 255, rtol=1e-6)
    np.testing.assert_allclose(x[1, :, 0, 0], [-2, -1.5, -1, -0.5])  # x from 98 in 100..104
    np.testing.assert_allclose(x[2, 0, :, 0], [-1, 0, 1, 2])  # y from 0 in 0..2
    np.testing.assert_allclose(x[3, 0, 0, :], [-0.5, -0.25, 0, 0.25])  # z from 2 in 0..8
    far = network_input(scan, np.array([50, 50, 50]), (4, 4, 4), 1)
    np.testing.assert_allclose(far, 170 / 255, rtol=1e-6)


def test_devices():
    assert pick_device("cpu") == CPU
    with pytest.raises(ValueError, match=r"device: expected auto, cpu or cuda\[:N\], got 'gpu7'"):
        pick_device("gpu7")
    with pytest.raises(ValueError, match="CUDA devices here"):
        pick_device("cuda:99")


def test_no_emulated_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    with mixed_precision(CPU):
        assert not torch.is_autocast_enabled("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    with mixed_precision(CPU):
        assert torch.is_autocast_enabled("cpu")


def test_a_real_scan_gives_the_same_boxes_as_nifti_and_as_dicom(real_data, tmp_path):
    detector = Detector.load(SHIPPED)
    with tarfile.open(real_data / "lidc_0063" / "dicom.tar.gz") as archive:
        archive.extractall(tmp_path)
    nifti = detector.detect(read_volume(real_data / "lidc_0063" / "ct.nii.gz"))
    dicom = detector.detect(read_volume(find_studies(tmp_path)[0].path))
    assert len(nifti) == len(dicom) > 0
    for one, other in zip(nifti, dicom, strict=True):
        np.testing.assert_allclose(one.nodule.center_lps_mm, other.nodule.center_lps_mm, atol=0.5)
        assert abs(one.nodule.diameter_mm - other.nodule.diameter_mm) < 0.5
