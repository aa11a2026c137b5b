"""Which scan should be labelled next? What a model sees in each, and strategies to order them."""
