"""What the app adds to MONAI Label: its settings, and one task each to detect and to train."""
