"""Checkpoints as the driver sees them: when both halves are written, one rename makes them valid."""
