"""A million tasks through one worker, and nothing grows: `make soak`."""
