"""What comes out: numbers in, text and figures out; never a tensor, never the network."""
