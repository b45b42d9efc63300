"""The driver: order of phases, validation, checkpoints, metrics and the report."""
