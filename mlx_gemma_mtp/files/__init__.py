"""Folders and files of models."""
