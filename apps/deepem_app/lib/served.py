"""Which model file is served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def served(paths: Sequence[Path]) -> Path | None:
    """The last of ``paths`` that is there: the published model before the shipped one."""
    return next((path for path in reversed(paths) if path.is_file()), None)
