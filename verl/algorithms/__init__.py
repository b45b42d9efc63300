"""Advantages, losses and KL control as pure functions: tensors and numbers in, tensors out.

No rank, no device, no Ray. Letters: B samples, P prompts, T response tokens of all samples one
after another. `docs/notation.md` holds the conventions.
"""
