"""From the engine to HTTP."""
