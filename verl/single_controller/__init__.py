"""Places worker processes with Ray and calls them. Knows nothing of reinforcement learning."""
