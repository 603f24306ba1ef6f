"""Losses: pure functions of tensors. A stage closes over one and hands it to the training loop."""
