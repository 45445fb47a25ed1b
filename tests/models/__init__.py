"""The protocols as small models, explored whole: every interleaving, not a random one.

`explore` is the explorer. `doorbell`, `lease`, `poison` and `limits` are the models, and `runs` lists the sizes of them
that are explored. `drawing` makes the picture and the tables in docs/protocol.md. `python -m tests.models` writes
these, and test_models.py checks them.
"""
