"""Enqueueing from Python, and waiting for results."""
