"""Looking at all scans, so that they can be ranked, whenever there is something new to look at."""

from lib.scoring.keeper import Keeper
from lib.scoring.nodule_detection import NoduleDetection

__all__ = ["Keeper", "NoduleDetection"]
