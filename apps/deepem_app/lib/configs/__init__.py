"""One module per model, named like the model."""
