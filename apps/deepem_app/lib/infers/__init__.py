"""Tasks that answer with findings."""

from lib.infers.nodule_detection import NoduleDetection

__all__ = ["NoduleDetection"]
