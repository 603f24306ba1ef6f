"""From a checkpoint to text."""
