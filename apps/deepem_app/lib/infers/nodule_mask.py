"""The same findings as a mask on the CT's own voxels, for OHIF and other viewers of masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferType

from deepem.masks import band_values, nodule_mask, write_mask
from deepem.nodule import Proposal
from lib.conf import AppConf, boolean, one_of
from lib.infers.findings import FindingsTask
from lib.served import Found, ServedDetector

_SUFFIXES = (".nii.gz", ".nii", ".nrrd")


class NoduleMask(FindingsTask):
    """Spheres, uint8: one label for all, or on request one for each confidence band."""

    def __init__(self, labels: dict[str, int], detector: ServedDetector, conf: AppConf):
        super().__init__(
            InferType.SEGMENTATION,
            labels,
            "Pulmonary nodules in chest CT, as a mask of spheres",
            detector,
            conf,
            confidence_bands=False,
        )

    def suffix(self, request: Mapping[str, Any]) -> str:
        """What the client asks for: OHIF and Slicer want NRRD."""
        return one_of({"result_extension": _SUFFIXES[0], **request}, "result_extension", _SUFFIXES)

    def write(
        self, request: Mapping[str, Any], file: Path, findings: Sequence[Proposal], found: Found
    ) -> dict[str, int]:
        """The mask; Slicer counts on names for exactly the values that occur, in their order."""
        bands = boolean(request, "confidence_bands", False)
        values = band_values(findings) if bands else [1] * len(findings)
        mask = nodule_mask([finding.nodule for finding in findings], found.grid, values)
        write_mask(file, mask, found.grid, compress=boolean(request, "result_compress", True))
        drawn = set(mask[mask > 0].tolist()) or {1}
        return {name: value for name, value in self.labels.items() if value in drawn}
