"""Requests, the batch that carries them, and the facade."""
