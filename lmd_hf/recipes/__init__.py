"""From numbers to decisions: ranks of an adapter, layers to train, the adapter that is the difference of two models."""
