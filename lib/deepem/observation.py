"""What a record says when a nodule is there: p(slice | nodule), p(lobe | nodule), and more.

All functions are pure, work on arrays and return natural logarithms. P proposals, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from deepem.lungs import Lungs
from deepem.nodule import ATTENUATIONS, Lobe, WeakLabel

LOBES = tuple(Lobe)


@dataclass(frozen=True)
class SliceModel:
    """Truncated half-Gaussian around the reported slice (Zhu et al. 2018, Eq. 3).

    slack_mm: mu, the smallest radius: inside a nodule every slice is as good. sigma_mm: standard
    deviation of the radii. Both of LUNA16's 1186 nodules.
    """

    slack_mm: float = 1.627
    sigma_mm: float = 2.381

    def __post_init__(self) -> None:
        if not (self.slack_mm >= 0 and 0 < self.sigma_mm < math.inf):
            raise ValueError(
                "slack_mm, sigma_mm: expected 0 or more and more than 0, "
                f"got {self.slack_mm} and {self.sigma_mm}"
            )

    @classmethod
    def fitted(cls, diameter_mm: np.ndarray) -> SliceModel:
        """Of the nodules of a strong set; ValueError for fewer than two different diameters."""
        radius_mm = np.asarray(diameter_mm, dtype=np.float64) / 2
        if len(radius_mm) < 2 or radius_mm.std() == 0:
            raise ValueError(f"diameters: expected two different ones, got {len(radius_mm)}")
        return cls(float(radius_mm.min()), float(radius_mm.std()))

    def blurred(self, off_mm: float) -> SliceModel:
        """The same where reported slices are off by a normal distance (beyond the paper)."""
        return replace(self, sigma_mm=math.hypot(self.sigma_mm, off_mm))

    def log_density(self, distance_mm: np.ndarray) -> np.ndarray:
        """Log of Eq. 3 for the distances (...) between reported slice and nodule centre."""
        beyond = np.maximum(np.abs(distance_mm) - self.slack_mm, 0) / self.sigma_mm
        scale = math.log(2 / math.sqrt(2 * math.pi * self.sigma_mm**2))
        return scale - 0.5 * beyond**2


@dataclass(frozen=True, eq=False)
class LobeModel:
    """Multinomial logistic regression on the position in the lung bounding box.

    weights: (6, 3), bias: (6,), lobes in the order of `Lobe`; features are the relative position
    0..1 along LPS x (patient's right to left), y (front to back), z (feet to head).
    wrong: share of labels that name any other lobe by mistake (beyond the paper).
    """

    weights: np.ndarray
    bias: np.ndarray
    wrong: float = 0.0

    def __post_init__(self) -> None:
        if self.weights.shape != (6, 3) or self.bias.shape != (6,):
            raise ValueError(
                f"weights, bias: expected (6, 3) and (6,), got {self.weights.shape} and "
                f"{self.bias.shape}"
            )
        if not 0 <= self.wrong < 1:
            raise ValueError(f"wrong: expected a share in [0, 1), got {self.wrong}")

    @classmethod
    def anatomical(cls, wrong: float = 0.0) -> LobeModel:
        """A start before anything is learned: fitted to the lobe maps of synthetic chests.

        `scripts/fit_lobe_model.py` prints these numbers.
        """
        return cls(_ANATOMICAL[:, :3].copy(), _ANATOMICAL[:, 3].copy(), wrong)

    def refitted(
        self,
        relative: np.ndarray,
        lobes: Sequence[Lobe],
        weight: np.ndarray,
        strength: float = 50.0,
    ) -> LobeModel:
        """The M-step for this factor: positions (N, 3), their reported lobes and weights (N,).

        The current model counts like ``strength`` nodules, spread over the box: lobes that the
        labels hardly mention keep their place instead of being forgotten.
        """
        if not len(relative) == len(lobes) == len(weight):
            raise ValueError(
                "relative, lobes, weight: expected equal lengths, got "
                f"{len(relative)}, {len(lobes)}, {len(weight)}"
            )
        anchors = np.stack(np.meshgrid(*[np.linspace(0.05, 0.95, 7)] * 3, indexing="ij"), -1)
        anchors = anchors.reshape(-1, 3)
        share = np.exp(LobeModel(self.weights, self.bias).log_probability(anchors))
        features = np.concatenate([relative, np.repeat(anchors, 6, axis=0)])
        reported = [LOBES.index(lobe) for lobe in lobes]
        names = np.concatenate([reported, np.tile(range(6), len(anchors))])
        weights = np.concatenate([weight, (share * strength / len(anchors)).ravel()])
        fit = LogisticRegression(C=1e4, max_iter=2000).fit(features, names, sample_weight=weights)
        return LobeModel(fit.coef_, fit.intercept_, self.wrong)

    def log_probability(self, relative: np.ndarray) -> np.ndarray:
        """(P, 3) relative positions -> (P, 6) log probability that a record names each lobe."""
        log_p = log_softmax(relative @ self.weights.T + self.bias, axis=1)
        if self.wrong == 0:
            return log_p
        return np.log((1 - self.wrong) * np.exp(log_p) + self.wrong * (1 - np.exp(log_p)) / 5)


@dataclass(frozen=True)
class SizeModel:
    """log(reported / proposed diameter), normal around ``log_bias`` (beyond the paper).

    A detector that is still learning is off by a half, and usually to one side.
    """

    log_bias: float = 0.0
    spread: float = 0.5

    def log_density(self, reported_mm: float, diameter_mm: np.ndarray) -> np.ndarray:
        """Log density of a reported diameter, in 1/mm, for proposals of ``diameter_mm`` (P,)."""
        off = (np.log(reported_mm / np.asarray(diameter_mm)) - self.log_bias) / self.spread
        return -0.5 * off**2 - math.log(self.spread * math.sqrt(2 * math.pi) * reported_mm)

    def refitted(
        self, log_ratio: np.ndarray, weight: np.ndarray, strength: float = 10.0
    ) -> SizeModel:
        """The M-step for this factor; the present model counts like ``strength`` nodules."""
        total = weight.sum() + strength
        bias = (weight @ log_ratio + strength * self.log_bias) / total
        variance = weight @ (log_ratio - bias) ** 2
        variance += strength * (self.spread**2 + (self.log_bias - bias) ** 2)
        return SizeModel(float(bias), float(math.sqrt(variance / total)))


def log_attenuation_probability(hu: np.ndarray) -> np.ndarray:
    """Mean HU inside the proposals (P,) -> (P, 3) log probability of each of `ATTENUATIONS`.

    Beyond the paper. What a reader calls solid, part-solid and ground glass, taken as normal in
    HU; partial volume makes small nodules look thinner than they are, so the classes are wide.
    """
    mean, spread = np.array(_HU_OF_ATTENUATION).T
    return log_softmax(-0.5 * ((hu[:, None] - mean) / spread) ** 2 - np.log(spread), axis=1)


@dataclass(frozen=True, eq=False)
class ObservationModel:
    """p(record | nodule), the product of its factors; a factor that a label lacks counts 1.

    size: None where reported diameters are no evidence. attenuation: whether kinds are (both beyond
    the paper).
    """

    slice: SliceModel
    lobe: LobeModel
    size: SizeModel | None = None
    attenuation: bool = False

    def log_observation(
        self,
        labels: Sequence[WeakLabel],
        z_lps_mm: np.ndarray,
        center_lps_mm: np.ndarray,
        diameter_mm: np.ndarray,
        lungs: Lungs,
        hu: np.ndarray,
    ) -> np.ndarray:
        """(L, P) log p(label | proposal) for the labels of one scan.

        z_lps_mm: (L,) where the reported slices lie, NaN for an unknown one. center_lps_mm (P, 3),
        diameter_mm (P,), mean hu (P,): of the proposals.
        """
        log_p = np.zeros((len(labels), len(center_lps_mm)))
        log_lobe = self.lobe.log_probability(lungs.relative(center_lps_mm))
        log_attenuation = log_attenuation_probability(hu)
        for row, label in enumerate(labels):
            if np.isfinite(z_lps_mm[row]):
                log_p[row] += self.slice.log_density(z_lps_mm[row] - center_lps_mm[:, 2])
            if label.lobe is not None:
                log_p[row] += log_lobe[:, LOBES.index(label.lobe)]
            if self.size and label.diameter_mm is not None:
                log_p[row] += self.size.log_density(label.diameter_mm, diameter_mm)
            if self.attenuation and label.attenuation is not None:
                log_p[row] += log_attenuation[:, ATTENUATIONS.index(label.attenuation)]
        return log_p

    def log_peak(self, label: WeakLabel) -> float:
        """What a nodule that fits the label perfectly would have; densities have units."""
        log_p = 0.0
        if label.z_lps_mm is not None:
            log_p += float(self.slice.log_density(np.zeros(1))[0])
        if self.size and label.diameter_mm is not None:
            perfect = label.diameter_mm / math.exp(self.size.log_bias)
            log_p += float(self.size.log_density(label.diameter_mm, np.array([perfect]))[0])
        return log_p


_HU_OF_ATTENUATION = [(-50.0, 170.0), (-330.0, 170.0), (-600.0, 130.0)]
"""Mean and standard deviation, in the order of `ATTENUATIONS`."""


_ANATOMICAL = np.array([
    # x, y, z, bias
    [-30.3, -8.0, 26.4, 6.1],  # RUL
    [-29.6, -6.8, -0.8, 19.5],  # RML
    [-31.3, 15.8, -24.6, 20.1],  # RLL
    [29.2, -9.3, 25.2, -22.7],  # LUL
    [30.5, -7.1, -1.4, -11.2],  # lingula
    [31.5, 15.5, -24.7, -11.8],  # LLL
])  # fmt: skip
