"""TODO data/schemas."""
