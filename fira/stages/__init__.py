"""What one runs: a stage brings batches and a loss to the one training loop."""
