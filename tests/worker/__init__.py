"""A worker: what it claims, how it runs handlers, how it settles, how it stops."""
