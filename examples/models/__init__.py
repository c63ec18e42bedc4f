"""Whole MoE models in Flax nnx, from Hugging Face checkpoints: what ``generate.py`` is made of."""
