"""Text becomes tokens becomes batches."""
