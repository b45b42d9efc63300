"""Files to samples: media on disk, rows, prompts, loaders. Knows no model, no rank and no Ray."""
