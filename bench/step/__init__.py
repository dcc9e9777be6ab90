"""``python -m bench step``: one training step of one model, by every way to train it."""
