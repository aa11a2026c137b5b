"""How good a detector is on scans that it was not trained on: by their nodules, or by records."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepem.detector import MIN_LOGIT, propose
from deepem.errors import InputError
from deepem.froc import Froc, evaluate
from deepem.labelled import WeakStudy
from deepem.lungs import Lungs
from deepem.network import NoduleNet, fused
from deepem.nodule import Proposal, WeakLabel
from deepem.observation import LOBES, LobeModel, SliceModel
from deepem.patches import LabelledScan
from deepem.rounds import propose_all
from deepem.scan import ScanCache

_BAND_MM = SliceModel().slack_mm + SliceModel().sigma_mm
_LOBE_POSSIBLE = 0.2


def predictions_of(
    network: NoduleNet, scans: Sequence[LabelledScan], device: torch.device
) -> dict[str, list[Proposal]]:
    """What the network proposes in each scan, by series UID; the network itself stays as it is."""
    network = fused(copy.deepcopy(network)).to(device)
    return {item.scan.series_uid: propose(network, item.scan, device) for item in scans}


def by_nodules(network: NoduleNet, scans: Sequence[LabelledScan], device: torch.device) -> Froc:
    """FROC on scans with all of their nodules, by the rules of LUNA16."""
    return evaluate(
        annotations={item.scan.series_uid: list(item.nodules) for item in scans},
        predictions=predictions_of(network, scans, device),
        series=[item.scan.series_uid for item in scans],
    )


def by_records(
    network: NoduleNet, weak: Sequence[WeakStudy], cache: ScanCache, device: torch.device
) -> Froc:
    """FROC on scans with records alone: a proposal is a hit where a record could mean it.

    That is within 4.0 mm of the reported slice (Eq. 3: slack and sigma) and where the
    anatomical lobe model gives the reported lobe at least 0.2. Some false proposals lie there by
    chance, for every detector alike, so this compares detectors and says nothing absolute.
    Scans with a label that names neither slice nor lobe, and unreadable ones, are left out.
    """
    lobe = LobeModel.anatomical()
    told, predictions = {}, {}
    usable = [item for item in weak if all(label.z_lps_mm is not None or label.lobe is not None
                                           for label in item.labels)]  # fmt: skip
    network = fused(copy.deepcopy(network)).to(device)
    for item, found in propose_all(network, usable, cache, device, MIN_LOGIT):
        if not isinstance(found, InputError):
            uid = item.study.series_uid
            lungs = cache.get(item.study).lungs
            told[uid] = [_Record(label, lungs, lobe) for label in item.labels]
            predictions[uid] = found
    return evaluate(told, predictions, list(told), hits=_hits)


@dataclass(frozen=True, eq=False)
class _Record:
    label: WeakLabel
    lungs: Lungs
    lobe: LobeModel

    def could_mean(self, center_lps_mm: np.ndarray) -> np.ndarray:
        """(P, 3) -> (P,) bool."""
        fits = np.ones(len(center_lps_mm), bool)
        if self.label.z_lps_mm is not None:
            fits &= np.abs(center_lps_mm[:, 2] - self.label.z_lps_mm) <= _BAND_MM
        if self.label.lobe is not None:
            log_p = self.lobe.log_probability(self.lungs.relative(center_lps_mm))
            fits &= log_p[:, LOBES.index(self.label.lobe)] >= np.log(_LOBE_POSSIBLE)
        return fits


def _hits(records: Sequence[_Record], center_lps_mm: np.ndarray) -> np.ndarray:
    fits = [record.could_mean(center_lps_mm) for record in records]
    return np.array(fits, bool).reshape(len(records), len(center_lps_mm))
