"""elmlib: a frozen language model learns to read a text embedding."""
