"""The protocols as small models, explored whole: every interleaving, not a random one.

`explore` is the explorer, `doorbell` and `lease` are the models, `runs` is what of them is explored, and `drawing`
makes of it the picture and the tables in docs/protocol.md. `python -m tests.models` writes those;
tests/models/test_models.py checks them.
"""
