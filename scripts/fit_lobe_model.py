"""Print the weights of `LobeModel.anatomical`, fitted to the lobe maps of 24 mini phantoms.

python scripts/fit_lobe_model.py
"""

from __future__ import annotations

import numpy as np
from rich.progress import track
from sklearn.linear_model import LogisticRegression

from deepem.lungs import find_lungs
from deepem.phantom import make_phantom
from deepem.volume import Volume

PHANTOMS, POINTS = 24, 2000


def main() -> None:
    features, lobes = [], []
    rng = np.random.default_rng(0)
    for seed in track(range(500, 500 + PHANTOMS)):
        phantom = make_phantom(seed, nodule_count=0)
        lungs = find_lungs(Volume(phantom.hu, phantom.grid, phantom.series_uid))
        index = rng.choice(np.argwhere(phantom.lobes > 0), POINTS)
        features.append(lungs.relative(phantom.grid.to_world(index)))
        lobes.append(phantom.lobes[tuple(index.T)] - 1)
    x, y = np.concatenate(features), np.concatenate(lobes)
    fit = LogisticRegression(C=10, max_iter=5000).fit(x, y)
    table = np.column_stack([fit.coef_, fit.intercept_])
    print(np.array2string(table.round(1), separator=", "))
    print(f"accuracy {fit.score(x, y):.3f}")


if __name__ == "__main__":
    main()
