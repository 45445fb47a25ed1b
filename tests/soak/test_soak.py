"""The short cut of __main__.py: 20,000 tasks, and nothing grows."""

from __future__ import annotations

import pytest

from . import __main__ as soak

pytestmark = pytest.mark.slow


async def test_nothing_grows(dsn: str) -> None:
    samples, ran = await soak.soak(dsn, 20_000, vacuum=True)
    print(soak.show(samples))
    assert soak.wrong(20_000, ran) == []
    assert soak.grown(samples) == []


def test_what_grows_is_named() -> None:
    samples = [dict.fromkeys(soak.BOUNDS, 10.0), dict.fromkeys(soak.BOUNDS, 10.0)]
    assert soak.grown(samples) == []
    for name, bound in soak.BOUNDS.items():
        more = [samples[0], samples[1] | {name: 10.1 + bound}]
        assert [problem.partition(" grew")[0] for problem in soak.grown(more)] == [name]
