"""The target and the drafter."""
