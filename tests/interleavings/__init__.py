"""Concurrent sessions, stepped statement by statement in the order that goes wrong most easily."""
