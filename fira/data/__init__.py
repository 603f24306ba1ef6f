"""Text becomes tokens, and tokens become training batches."""
