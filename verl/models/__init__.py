"""One adapter a model family: embedding, positions, visual spans, weight names. No rank, no Ray."""
