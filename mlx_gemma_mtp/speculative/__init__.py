"""Draft, verify, accept, commit."""
