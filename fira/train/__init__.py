"""Batches, a model and a loss in; checkpoints and a record out."""
