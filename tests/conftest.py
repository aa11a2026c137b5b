"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest


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
