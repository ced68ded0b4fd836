"""Prompts: what student and teacher read, controls, the leak meter, and the think mask."""
