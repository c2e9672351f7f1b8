"""What is written to the Hub: the section of a model card, as text first, and then as a pull request."""
