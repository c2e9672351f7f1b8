"""Watching a training: which matrices to measure in the time there is, their series, and what it says at the end."""
