"""Tasks that answer with findings."""

from lib.infers.nodule_detection import NoduleDetection
from lib.infers.nodule_mask import NoduleMask

__all__ = ["NoduleDetection", "NoduleMask"]
