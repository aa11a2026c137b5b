"""Tasks that train on submitted labels."""

from lib.trainers.nodule_detection import NoduleDetection

__all__ = ["NoduleDetection"]
