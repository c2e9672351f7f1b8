"""What is done to one matrix: tensors in, tensors or numbers out; no names, no files."""
