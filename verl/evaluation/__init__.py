"""Accuracy of a Hugging Face model folder on question-answering files."""
