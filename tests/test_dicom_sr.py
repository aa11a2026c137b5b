"""The measurement report, read back by highdicom and by a plain walk over the content tree."""

from __future__ import annotations

from dataclasses import replace

import highdicom as hd
import numpy as np
import pydicom
import pytest
from series import write_dicom
from test_app import publish_random_weights
from test_dicom_seg import SERIES

from deepem.dicom import measurement_report, read_source
from deepem.dicom import write_dicom as write_file
from deepem.lungs import Lungs
from deepem.model import load_model
from deepem.nodule import Nodule, Proposal

FINDINGS = [
    Proposal(Nodule((-14.5, 2.25, 12.0), 7.5123), 2.5),  # right, above
    Proposal(Nodule((13.0, 6.0, -14.5), 4.25), -0.7),  # left, behind, below
    Proposal(Nodule((12.0, -3.0, 1.0), 5.0), -1.0),  # left, in front, in the middle: lingula
]
SITES = ["Upper lobe of right lung", "Lower lobe of left lung", "Upper lobe of left lung"]


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    publish_random_weights(path)
    return load_model(path)[1]


@pytest.fixture(params=["head_first", "no_order", "oblique"])
def source(request, tmp_path, rng):
    grid, number = SERIES[request.param]
    hu = rng.integers(-1000, 400, grid.shape).astype(np.int16)
    write_dicom(tmp_path / "ct", hu, grid.affine_lps_mm, number=number, patient="Jane")
    return read_source(tmp_path / "ct")


@pytest.fixture
def lungs(source):
    return Lungs(np.ones(source.grid.shape, bool), source.grid, np.full(3, -20.0),
                 np.full(3, 20.0), found=True)  # fmt: skip


@pytest.fixture
def written(source, lungs, card, tmp_path):
    write_file(measurement_report(FINDINGS, source, lungs, card), tmp_path / "sr.dcm")
    return tmp_path / "sr.dcm"


def test_highdicom_reads_the_same_numbers(written, source, card):
    report = hd.sr.srread(str(written))
    assert isinstance(report, hd.sr.Comprehensive3DSR)
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert len(groups) == len(FINDINGS)
    for group, finding, site in zip(groups, FINDINGS, SITES, strict=True):
        surface = np.reshape(group.roi.graphic_data, (6, 3))
        np.testing.assert_allclose(surface.mean(0), finding.nodule.center_lps_mm, atol=1e-4)
        radius = np.linalg.norm(surface - finding.nodule.center_lps_mm, axis=1)
        np.testing.assert_allclose(2 * radius, finding.nodule.diameter_mm, atol=1e-4)
        diameter, certainty = group.get_measurements()
        assert diameter.name.meaning == "Diameter" and diameter.unit.value == "mm"
        assert diameter.value == pytest.approx(finding.nodule.diameter_mm, abs=1e-4)
        assert certainty.name.meaning == "Certainty of Finding" and certainty.unit.value == "%"
        assert certainty.value == pytest.approx(100 * finding.probability, abs=1e-4)
        assert [item.value.meaning for item in group.finding_sites] == [site]
        assert group.finding_type.meaning == "Nodule"


def walk(item, depth=0):
    yield item
    for child in item.get("ContentSequence", []):
        yield from walk(child, depth + 1)


def test_a_plain_walk_reads_the_same_numbers(written, source, card):
    """Without highdicom, by codes alone, as any receiver would."""
    report = pydicom.dcmread(written)
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    items = {}
    for item in walk(report):
        if "ConceptNameCodeSequence" in item:
            items.setdefault(item.ConceptNameCodeSequence[0].CodeValue, []).append(item)
    diameters = [float(i.MeasuredValueSequence[0].NumericValue) for i in items["81827009"]]
    assert diameters == [7.5123, 4.25, 5.0]
    shares = [float(i.MeasuredValueSequence[0].NumericValue) for i in items["111012"]]
    np.testing.assert_allclose(shares, [100 * f.probability for f in FINDINGS], atol=1e-4)
    codes = [i.ConceptCodeSequence[0].CodeValue for i in items["363698007"]]
    assert codes == ["42400003", "41224006", "44714003"]
    centers = [np.reshape(i.GraphicData, (6, 3)).mean(0) for i in items["121231"]]
    np.testing.assert_allclose(centers, [f.nodule.center_lps_mm for f in FINDINGS], atol=1e-4)
    frame = source.headers[0].FrameOfReferenceUID
    assert {i.ReferencedFrameOfReferenceUID for i in items["121231"]} == {frame}
    tracking = [i.UID for i in items["112040"]]
    assert len(set(tracking)) == 3
    (serial,) = items["121016"]
    assert serial.TextValue == card.weights_fingerprint
    versions = {i.TextValue for i in items["111003"]}
    assert versions == {card.deepem_version}


def test_each_group_names_the_nearest_slice(written, source):
    groups = [item for item in walk(pydicom.dcmread(written)) if item.ValueType == "IMAGE"]
    for item, finding in zip(groups, FINDINGS, strict=True):
        uid = item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        (k,) = [k for k, h in enumerate(source.headers) if h.SOPInstanceUID == uid]
        assert abs(source.grid.to_index(np.array(finding.nodule.center_lps_mm))[2] - k) <= 0.5


def test_it_belongs_to_the_patient_and_the_same_report_is_the_same_object(source, lungs, card):
    first, again = (measurement_report(FINDINGS, source, lungs, card) for _ in range(2))
    assert first.SOPInstanceUID == again.SOPInstanceUID
    assert (first.PatientID, first.Modality) == ("Jane", "SR")
    assert first.StudyInstanceUID == source.headers[0].StudyInstanceUID
    assert (first.CompletionFlag, first.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    fewer = measurement_report(FINDINGS[:2], source, lungs, card)
    other = measurement_report(FINDINGS, source, lungs, replace(card, weights_fingerprint="x"))
    uids = {item.SOPInstanceUID for item in (first, fewer, other)}
    assert len(uids) == len({item.SeriesInstanceUID for item in (first, fewer, other)}) == 3


def test_no_finding_is_a_report_too(source, lungs, card, tmp_path):
    write_file(measurement_report([], source, lungs, card), tmp_path / "sr.dcm")
    report = hd.sr.srread(str(tmp_path / "sr.dcm"))
    assert report.content.get_volumetric_roi_measurement_groups() == []


def test_without_lungs_the_site_is_the_lung(source, lungs, card):
    report = measurement_report(FINDINGS, source, replace(lungs, found=False), card)
    sites = [item.ConceptCodeSequence[0].CodeMeaning for item in walk(report)
             if item.get("ConceptNameCodeSequence")
             and item.ConceptNameCodeSequence[0].CodeValue == "363698007"]  # fmt: skip
    assert sites == ["Lung"] * 3
