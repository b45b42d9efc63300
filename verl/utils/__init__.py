"""Leaves: checkpoints, loggers, answers, small helpers. Nothing here imports the rest of verl."""
