"""Where scans and labels lie: a folder, or a PACS that speaks DICOMweb. No label is ever lost."""

from lib.datastore.dicomweb import DicomWebStore
from lib.datastore.local import LocalStore

__all__ = ["DicomWebStore", "LocalStore"]
