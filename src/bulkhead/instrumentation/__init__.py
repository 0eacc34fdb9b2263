"""Seeing a run: progress while it goes on, its timeline afterwards. Nothing here is imported before it is asked for."""
