"""The coded terms that SEG and SR share: SNOMED CT, DICOM, LOINC, UCUM."""

from __future__ import annotations

from pydicom.sr.coding import Code

from deepem.nodule import Lobe

ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")
ABNORMAL_STRUCTURE = Code("49755003", "SCT", "Morphologically Abnormal Structure")
CERTAINTY = Code("111012", "DCM", "Certainty of Finding")
CT_CHEST = Code("24627-2", "LN", "CT Chest")
DEVICE = Code("121007", "DCM", "Device")
DIAMETER = Code("81827009", "SCT", "Diameter")
MEASUREMENT_REPORT = Code("126000", "DCM", "Imaging Measurement Report")
MILLIMETER = Code("mm", "UCUM", "millimeter")
PERCENT = Code("%", "UCUM", "Percent")
NODULE = Code("27925004", "SCT", "Nodule")
LUNG = Code("39607008", "SCT", "Lung")

_LEFT_UPPER = Code("44714003", "SCT", "Upper lobe of left lung")
LOBES = {
    Lobe.RUL: Code("42400003", "SCT", "Upper lobe of right lung"),
    Lobe.RML: Code("72481006", "SCT", "Middle lobe of right lung"),
    Lobe.RLL: Code("266005", "SCT", "Lower lobe of right lung"),
    Lobe.LUL: _LEFT_UPPER,
    Lobe.LINGULA: _LEFT_UPPER,  # of which it is a part
    Lobe.LLL: Code("41224006", "SCT", "Lower lobe of left lung"),
}
