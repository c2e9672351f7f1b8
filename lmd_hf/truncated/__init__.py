"""Smaller models: weights in factors, how many axes each keeps, and how such a model is saved and loaded again."""
