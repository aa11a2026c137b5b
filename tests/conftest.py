"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from deepem.geometry import RAS_TO_LPS, Grid
from deepem.labelled import LabelledStudy
from deepem.nodule import Nodule
from deepem.volume import Study

if "PYTEST_XDIST_WORKER" in os.environ:  # another worker has the other cores
    os.environ["OMP_NUM_THREADS"] = "1"  # of the servers and trainings that tests start
    torch.set_num_threads(1)
else:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real CT and the LUNA16 tables; it is never part of the repository."""
    folder = os.environ.get("DEEPEM_REAL_DATA")
    if not folder:
        pytest.skip("DEEPEM_REAL_DATA is not set: no real data to test with")
    if not Path(folder).is_dir():
        pytest.fail(f"DEEPEM_REAL_DATA: expected a folder, got {folder}")
    return Path(folder)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20180916)


@pytest.fixture(scope="session")
def easy_studies(tmp_path_factory) -> list[LabelledStudy]:
    """Six small noisy volumes with two bright spheres each: a minute of training finds them."""
    folder = tmp_path_factory.mktemp("easy")
    labelled = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        shape = (72, 64, 80)
        grid = Grid.axis_aligned(np.array([-30.0, 10, -200]), 1.0, shape)
        hu = rng.normal(-850, 40, shape)
        position = grid.to_world(np.moveaxis(np.indices(shape), 0, -1))
        nodules = []
        for k in (22, 58):
            index = np.array([*rng.uniform(18, 46, 2), k])
            nodule = Nodule(tuple(grid.to_world(index)), rng.uniform(7, 14))
            distance_mm = np.linalg.norm(position - nodule.center_lps_mm, axis=-1)
            hu[distance_mm < nodule.diameter_mm / 2] += 880
            nodules.append(nodule)
        path = folder / f"easy{seed}.nii.gz"
        affine = RAS_TO_LPS @ grid.affine_lps_mm
        nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), path)
        labelled.append(LabelledStudy(Study(f"easy{seed}", path, f"patient{seed}"), tuple(nodules)))
    return labelled
