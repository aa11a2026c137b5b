"""What one model sees in one scan: all that a strategy of ranking may ask for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RecordEvidence:
    """One record under the model.

    says: its words. entropy: nats, over the proposals that it may mean and none of them. missed:
    probability that it means none of them.
    """

    says: str
    entropy: float
    missed: float


@dataclass(frozen=True, eq=False)
class ScanEvidence:
    """What one model sees in one scan.

    proposals, mirrored: (P, 5) x, y, z in LPS mm, diameter in mm, logit, best first; of the scan
    and of its mirror image, both where they are in the patient.
    features: (F,) of the detector's last layer, pooled over the scan by the probability of a
    nodule. records: what the records say, none if they call the scan clean; None without any.
    """

    series_uid: str
    proposals: np.ndarray
    mirrored: np.ndarray
    features: np.ndarray
    records: tuple[RecordEvidence, ...] | None = None

    @property
    def foreground(self) -> bool:
        """Whether there seems to be a nodule: by the records, else by the detector."""
        if self.records is not None:
            return bool(self.records)
        return bool((self.proposals[:, 4] >= 0).any())
