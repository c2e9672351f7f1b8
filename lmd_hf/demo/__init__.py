"""The embedded model: a one-million-parameter LLaMA trained on Python's standard library, and its training script."""
