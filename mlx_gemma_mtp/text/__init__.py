"""Text on both sides of the tokens."""
