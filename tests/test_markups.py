"""Slicer markups and labelmaps to nodules, and findings to markups."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from deepem.errors import InputError
from deepem.markups import read_label, read_labelmap, read_markups, write_markups
from deepem.nodule import Nodule, Proposal

# A box as 3D Slicer 5 saves it; its axes are turned by 30 degrees around z.
SLICER_ROI = """{
    "type": "ROI",
    "coordinateSystem": "LPS",
    "coordinateUnits": "mm",
    "locked": false,
    "fixedNumberOfControlPoints": false,
    "labelFormat": "%N-%d",
    "lastUsedControlPointNumber": 1,
    "controlPoints": [
        {
            "id": "1",
            "label": "R-1",
            "description": "",
            "associatedNodeID": "vtkMRMLScalarVolumeNode1",
            "position": [-61.5, 20.25, -112.75],
            "orientation": [-1.0, -0.0, -0.0, -0.0, -1.0, -0.0, 0.0, 0.0, 1.0],
            "selected": true,
            "locked": false,
            "visibility": true,
            "positionStatus": "defined"
        }
    ],
    "measurements": [
        {
            "name": "volume",
            "enabled": false,
            "units": "cm3",
            "printFormat": "%-#4.4g%s"
        }
    ],
    "roiType": "Box",
    "center": [-61.5, 20.25, -112.75],
    "orientation": [-0.866, 0.5, 0.0, -0.5, -0.866, 0.0, 0.0, 0.0, 1.0],
    "size": [9.0, 8.0, 10.0],
    "insideOut": false,
    "display": {
        "visibility": true,
        "opacity": 1.0,
        "color": [0.4, 1.0, 1.0],
        "selectedColor": [1.0, 0.5000076295109483, 0.5000076295109483],
        "propertiesLabelVisibility": true,
        "handlesInteractive": false,
        "snapMode": "toVisibleSurface"
    }
}"""


def roi(**changes: object) -> dict:
    return json.loads(SLICER_ROI) | changes


@pytest.fixture
def saved(tmp_path):
    def save(*markups: object) -> Path:
        path = tmp_path / "label.json"
        path.write_text(json.dumps({"@schema": "markups-schema-v1.0.3.json#", "markups": markups}))
        return path

    return save


def test_a_box_that_slicer_saved_is_a_nodule(saved):
    assert read_markups(saved(roi())) == (Nodule((-61.5, 20.25, -112.75), 9.0),)


def test_coordinates_in_ras_are_turned_into_lps(saved):
    assert read_markups(saved(roi(coordinateSystem="RAS"))) == (
        Nodule((61.5, -20.25, -112.75), 9.0),
    )


def test_boxes_keep_their_order(saved):
    nodules = read_markups(saved(roi(), roi(center=[1, 2, 3], size=[4, 4, 4])))
    assert nodules[1] == Nodule((1, 2, 3), 4)
    assert len(nodules) == 2


def test_findings_survive_the_way_to_slicer_and_back(tmp_path):
    nodules = (Nodule((-12.5, 33.125, -240.0), 8.1), Nodule((70, -20.5, 3), 31))
    write_markups(tmp_path / "found.json", [Proposal(nodules[0], 2.6), nodules[1]])
    assert read_markups(tmp_path / "found.json") == nodules


def test_score_and_diameter_stand_where_slicer_keeps_them(tmp_path):
    write_markups(tmp_path / "found.json", [Proposal(Nodule((1, 2, 3), 8.1), 2.6)])
    content = json.loads((tmp_path / "found.json").read_text())
    (box,) = content["markups"]
    assert content["@schema"].endswith("markups-schema-v1.0.3.json#")
    assert (box["type"], box["roiType"], box["coordinateSystem"]) == ("ROI", "Box", "LPS")
    assert box["center"] == [1, 2, 3]
    assert box["size"] == [8.1, 8.1, 8.1]  # whole edges
    assert box["orientation"] == [-1, 0, 0, 0, -1, 0, 0, 0, 1]
    (point,) = box["controlPoints"]
    assert point["position"] == [1, 2, 3]
    assert point["label"] == "nodule 1  p=0.93  8.1 mm"  # 1 / (1 + exp(-2.6)) = 0.9309
    assert point["description"] == "probability 0.9309, diameter 8.10 mm"


def test_no_finding_is_an_empty_list_that_slicer_loads_and_no_box(tmp_path):
    write_markups(tmp_path / "found.json", [])
    (markup,) = json.loads((tmp_path / "found.json").read_text())["markups"]
    assert (markup["type"], markup["controlPoints"]) == ("Fiducial", [])
    assert read_markups(tmp_path / "found.json") == ()


@pytest.mark.parametrize(
    "never_placed", [{"size": [0, 0, 0]}, {"size": [7.0, 7.0, 0.0]}, {"controlPoints": []}]
)
def test_a_box_that_was_never_placed_is_dropped(saved, never_placed):
    assert read_markups(saved(roi(**never_placed), roi())) == (Nodule((-61.5, 20.25, -112.75), 9),)
    assert read_markups(saved(roi(**never_placed))) == ()


def test_a_file_without_boxes_is_a_clean_scan(saved):
    assert read_markups(saved()) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": [1, 2]}, "markup 2: size: expected three finite numbers"),
        ({"center": [1, float("nan"), 2]}, "markup 2: center: expected three finite numbers"),
        ({"center": None}, "markup 2: center"),
        ({"size": [130, 130, 130]}, r"markup 2: size: .* diameter_mm: expected \(0, 100\]"),
        ({"coordinateSystem": "IJK"}, "coordinateSystem: expected LPS or RAS, got IJK"),
        ({"coordinateUnits": "um"}, "coordinateUnits: expected mm, got um"),
        ({"type": "Fiducial"}, "type: expected ROI .*, got Fiducial"),
    ],
)
def test_what_is_no_nodule_is_refused_with_its_place(saved, changes, message):
    with pytest.raises(InputError, match=message):
        read_markups(saved(roi(), roi(**changes)))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"markups": {}}', '{"markups": [1]}', "\xff"])
def test_a_file_that_is_no_markups_is_refused(tmp_path, text):
    path = tmp_path / "label.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"label\.json"):
        read_label(path)


def labelmap(path: Path, voxels: np.ndarray, turned_deg: float = 0.0) -> Path:
    """Write [i, j, k] with spacing 0.5 x 1 x 2 mm, origin (-10, 20, 30), turned around z."""
    image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0))
    image.SetSpacing((0.5, 1.0, 2.0))
    image.SetOrigin((-10.0, 20.0, 30.0))
    cos, sin = np.cos(np.deg2rad(turned_deg)), np.sin(np.deg2rad(turned_deg))
    image.SetDirection((cos, -sin, 0, sin, cos, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("name", ["mask.nii.gz", "mask.nrrd"])
def test_components_of_a_labelmap_are_nodules(tmp_path, name):
    voxels = np.zeros((30, 20, 10), np.uint8)
    voxels[2:10, 4:8, 1:3] = 1  # 4 x 4 x 4 mm; centre at index (5.5, 5.5, 1.5)
    voxels[20, 10, 5] = voxels[21, 11, 6] = 1  # touch at a corner: one nodule, 1 x 2 x 4 mm
    voxels[10:14, 4:6, 1] = 2  # touches the first, but is another segment: 2 x 2 x 2 mm
    nodules = read_label(labelmap(tmp_path / name, voxels))
    assert sorted(nodules, key=lambda nodule: -nodule.diameter_mm) == [
        Nodule((-7.25, 25.5, 33.0), 4.0),
        Nodule((0.25, 30.5, 41.0), 7 / 3),
        Nodule((-4.25, 24.5, 32.0), 2.0),
    ]


def test_a_turned_labelmap_gives_world_coordinates(tmp_path):
    voxels = np.zeros((30, 20, 10), np.uint8)
    voxels[8:16, 6:10, 4:6] = 1  # centre at index (11.5, 7.5, 4.5): 5.75, 7.5, 9 mm from the origin
    (nodule,) = read_labelmap(labelmap(tmp_path / "mask.nrrd", voxels, turned_deg=90))
    np.testing.assert_allclose(nodule.center_lps_mm, (-17.5, 25.75, 39.0))
    assert nodule.diameter_mm == pytest.approx(4.0)


def test_overlapping_segments_are_read_one_by_one(tmp_path):
    layers = np.zeros((4, 8, 8, 2), np.uint8)  # [k, j, i, layer]
    layers[0:2, 0:2, 0:2, 0] = 1
    layers[1:3, 1:3, 1:3, 1] = 1
    sitk.WriteImage(sitk.GetImageFromArray(layers, isVector=True), str(tmp_path / "a.seg.nrrd"))
    assert read_label(tmp_path / "a.seg.nrrd") == (
        Nodule((0.5, 0.5, 0.5), 2.0),
        Nodule((1.5, 1.5, 1.5), 2.0),
    )


def test_an_empty_labelmap_is_a_clean_scan(tmp_path):
    assert read_label(labelmap(tmp_path / "mask.nii.gz", np.zeros((4, 5, 6), np.uint8))) == ()


def test_a_mask_of_a_lung_is_no_nodule(tmp_path):
    voxels = np.ones((250, 150, 100), np.uint8)
    with pytest.raises(InputError, match=r"mask.nii.gz, component at voxel \(0, 0, 0\)"):
        read_label(labelmap(tmp_path / "mask.nii.gz", voxels))


def test_a_corrupt_labelmap_is_refused(tmp_path):
    (tmp_path / "mask.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match="a readable NIfTI image"):
        read_label(tmp_path / "mask.nii.gz")
