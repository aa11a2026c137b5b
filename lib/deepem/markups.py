"""Nodules as people draw and see them in 3D Slicer: markups JSON with ROI boxes, and labelmaps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from deepem.errors import InputError
from deepem.files import write_json
from deepem.geometry import Grid, box_to_sphere, sphere_to_box
from deepem.nodule import Nodule, Proposal
from deepem.volume import read_image

_SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/"
    "Resources/Schema/markups-schema-v1.0.3.json#"
)
"""Slicer refuses a file without it; the address is a name, not a place."""

_AXES_IN_LPS = [-1, 0, 0, 0, -1, 0, 0, 0, 1]
"""A box along the patient's axes: the columns are Slicer's R, A and S, told in LPS."""


def write_markups(path: Path, findings: Sequence[Nodule | Proposal]) -> None:
    """Write one ROI box in LPS mm around each finding, in the order given.

    Slicer keeps only what it knows, so score and diameter go into the label and the description
    of the box's control point. No finding is written as one empty point list: Slicer reports a
    file without any markup as one that it failed to load, while an empty list loads silently,
    shows nothing and, being no ROI, is not submitted with the user's boxes.
    """
    markups = [_box(number, finding) for number, finding in enumerate(findings, start=1)]
    write_json(path, {"@schema": _SCHEMA, "markups": markups or [_nothing()]})


def read_label(path: Path) -> tuple[Nodule, ...]:
    """Nodules of a label file: markups when it is JSON, else a labelmap. None: a clean scan.

    Raises InputError when the file is unreadable or says something that is no nodule.
    """
    path = Path(path)
    return read_markups(path) if path.name.lower().endswith(".json") else read_labelmap(path)


def read_markups(path: Path) -> tuple[Nodule, ...]:
    """Nodules of Slicer markups: the centre of every ROI box, and the mean of its edges.

    The box may be turned any way. Boxes that were never placed (no control point, or an edge of
    0, as Slicer's own "SAM2 ROI") are dropped. Other markups are refused: to ignore what a reader
    marked would call the scan clean.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # JSON and Unicode errors are ValueErrors
        raise InputError(path, "file", "readable JSON", error) from error
    markups = content.get("markups") if isinstance(content, Mapping) else None
    if not isinstance(markups, list):
        raise InputError(path, "markups", "a list, as 3D Slicer writes it", type(markups).__name__)
    found = (_nodule(f"{path}, markup {at}", markup) for at, markup in enumerate(markups, start=1))
    return tuple(nodule for nodule in found if nodule is not None)


def read_labelmap(path: Path) -> tuple[Nodule, ...]:
    """Nodules of a NIfTI or NRRD labelmap: one for each connected component of each value.

    Voxels that touch at a corner are connected. Centre and diameter are those of the component's
    box along the voxel axes, so that a mask and a box drawn around it say the same nodule.
    Overlapping segments (the layers of a .seg.nrrd) are read one by one.
    """
    values, affine = read_image(path)
    if values.ndim < 3:
        raise InputError(path, "dimensions", "3 (one volume)", f"shape {values.shape}")
    grid = Grid(affine, values.shape[:3])
    layers = np.moveaxis(values.reshape(*grid.shape, -1), -1, 0)
    return tuple(
        _from_box(
            f"{path}, component at voxel {tuple(low.tolist())}",
            grid.to_world((low + high - 1) / 2),
            (high - low) * grid.spacing_mm,
        )
        for layer in layers
        for low, high in _components(layer)
    )


def _components(values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """First and one-past-last index (3,) of every connected component of every value but 0."""
    for value in np.unique(values[values != 0]):
        components, _ = ndimage.label(values == value, structure=np.ones((3, 3, 3)))
        for box in ndimage.find_objects(components):
            yield np.array([side.start for side in box]), np.array([side.stop for side in box])


def _from_box(where: object, center_lps_mm: np.ndarray, size_mm: np.ndarray) -> Nodule:
    center, diameter = box_to_sphere(center_lps_mm, size_mm)
    try:
        return Nodule(tuple(center), float(diameter))
    except ValueError as error:
        raise InputError(where, "size", "that of a nodule", error) from error


def _nodule(where: str, markup: Any) -> Nodule | None:
    """The nodule of one markup, None if it was never placed."""
    if not isinstance(markup, Mapping):
        raise InputError(where, "markup", "an object", type(markup).__name__)
    if markup.get("controlPoints") == []:
        return None
    if markup.get("type") != "ROI":
        raise InputError(where, "type", "ROI (a box)", markup.get("type"))
    size = _vector(where, markup, "size")
    if (size <= 0).any():
        return None
    center = _vector(where, markup, "center")
    frame = markup.get("coordinateSystem", "LPS")
    if frame not in ("LPS", "RAS"):
        raise InputError(where, "coordinateSystem", "LPS or RAS", frame)
    unit = markup.get("coordinateUnits", "mm")
    if unit != "mm":
        raise InputError(where, "coordinateUnits", "mm", unit)
    return _from_box(where, center * (-1, -1, 1) if frame == "RAS" else center, size)


def _vector(where: str, markup: Mapping[str, Any], field: str) -> np.ndarray:
    try:
        vector = np.array(markup.get(field), dtype=np.float64)
    except (TypeError, ValueError):
        vector = np.empty(0)
    if vector.shape != (3,) or not np.isfinite(vector).all():
        raise InputError(where, field, "three finite numbers", markup.get(field))
    return vector


def _box(number: int, finding: Nodule | Proposal) -> dict[str, Any]:
    if isinstance(finding, Proposal):
        nodule = finding.nodule
        score = f"p={finding.probability:.2f}  "
        description = f"probability {finding.probability:.4f}, "
    else:
        nodule, score, description = finding, "", ""
    center, size = sphere_to_box(np.array(nodule.center_lps_mm), np.array(nodule.diameter_mm))
    point = {
        "id": "1",
        "label": f"nodule {number}  {score}{nodule.diameter_mm:.1f} mm",
        "description": f"{description}diameter {nodule.diameter_mm:.2f} mm",
        "associatedNodeID": "",
        "position": center.tolist(),
        "orientation": _AXES_IN_LPS,
        "selected": True,
        "locked": False,
        "visibility": True,
        "positionStatus": "defined",
    }
    return {
        **_common("ROI", f"nodule {number}"),
        "roiType": "Box",
        "center": center.tolist(),
        "orientation": _AXES_IN_LPS,
        "size": size.tolist(),
        "insideOut": False,
        "controlPoints": [point],
        "display": {"visibility": True, "pointLabelsVisibility": True},
    }


def _nothing() -> dict[str, Any]:
    return {**_common("Fiducial", "no nodules found"), "controlPoints": []}


def _common(kind: str, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": kind,
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "locked": False,
        "fixedNumberOfControlPoints": False,
        "labelFormat": "%N-%d",
    }
