"""From a model to scores."""
