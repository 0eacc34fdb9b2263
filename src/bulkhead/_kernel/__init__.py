"""Decisions apart from actions: what should happen to jobs and slots, with no clock, lock, thread or process."""
