"""Where scans and labels lie: a folder, or a PACS that speaks DICOMweb. No label is ever lost."""
