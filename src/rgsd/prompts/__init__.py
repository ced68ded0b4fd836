"""Prompts: what student and teacher read, the mismatched control, the leak meter, and the think mask."""
