"""DeepEM: pulmonary nodule detection from strong and weak labels (Zhu et al., MICCAI 2018)."""

if __name__ != "deepem":
    raise ImportError(f"imported as {__name__!r}: run `pip install -e .`, then `import deepem`")

__version__ = "0.1.0"
