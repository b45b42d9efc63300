"""Reinforcement learning for vision-language models on long videos."""
