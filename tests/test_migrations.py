"""Upgrades: from every earlier schema, from wherever one was interrupted, under workers and producers that go on.

tests/schemas/N.sql is the schema as version N was, and tests/schemas/N/*.sql the statements of its workers.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from notifyq import schema, store, upgrade
from notifyq.schema import SCHEMA_VERSION

SCHEMAS = Path(__file__).parent / "schemas"
EARLIER = sorted(int(path.stem) for path in SCHEMAS.glob("*.sql"))

# Of an upgraded schema alone, and why.
LEFT = {
    "index task_aside": "version 1's workers read it; version 3 drops it",
}


@pytest.fixture
async def conn(empty_dsn: str) -> AsyncIterator[Any]:
    conn = await store.connect(empty_dsn, role="test")
    yield conn
    conn.terminate()


async def install(conn: Any, version: int) -> None:
    await conn.execute((SCHEMAS / f"{version}.sql").read_text())


async def drop(conn: Any) -> None:
    await conn.execute("DROP SCHEMA notifyq CASCADE")


# --- The same, whichever way it came


CATALOGS = """
    SELECT 'relation ' || relname AS what,
           concat_ws(' ', relkind, relpersistence, reloptions::text, relrowsecurity, obj_description(oid, 'pg_class'),
                     coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))) AS how
    FROM pg_class WHERE relnamespace = 'notifyq'::regnamespace AND relkind <> 'i'
    UNION ALL
    SELECT format('column %s of %s', attname, attrelid::regclass),
           concat_ws(' ', rank() OVER (PARTITION BY attrelid ORDER BY attnum), format_type(atttypid, atttypmod),
                     CASE WHEN attnotnull THEN 'not null' END, 'default ' || pg_get_expr(adbin, adrelid), attidentity,
                     attgenerated, attstorage, attcompression, attcollation::regcollation, attstattarget,
                     attoptions::text, attacl::text, col_description(attrelid, attnum))
    FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attnum > 0 AND NOT attisdropped AND attrelid IN (
        SELECT oid FROM pg_class WHERE relnamespace = 'notifyq'::regnamespace AND relkind IN ('r', 'v', 'p'))
    UNION ALL
    SELECT format('constraint %s of %s', conname, conrelid::regclass),
           concat_ws(' ', pg_get_constraintdef(oid), convalidated)
    FROM pg_constraint WHERE connamespace = 'notifyq'::regnamespace
    UNION ALL
    SELECT 'index ' || relname, concat_ws(' ', pg_get_indexdef(oid), indisvalid, indisreplident, reloptions::text)
    FROM pg_class JOIN pg_index ON indexrelid = oid WHERE relnamespace = 'notifyq'::regnamespace
    UNION ALL
    SELECT 'sequence ' || seqrelid::regclass,
           concat_ws(' ', seqtypid::regtype, seqstart, seqincrement, seqmax, seqcache,
                     pg_describe_object(refclassid, refobjid, refobjsubid))
    FROM pg_sequence JOIN pg_depend ON objid = seqrelid AND deptype IN ('a', 'i')
    UNION ALL
    SELECT 'function ' || oid::regprocedure,
           concat_ws(' ', pg_get_functiondef(oid), coalesce(proacl, acldefault('f', proowner)),
                     obj_description(oid, 'pg_proc'))
    FROM pg_proc WHERE pronamespace = 'notifyq'::regnamespace
    UNION ALL
    SELECT format('trigger %s of %s', tgname, tgrelid::regclass), concat_ws(' ', pg_get_triggerdef(t.oid), tgenabled)
    FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
    WHERE relnamespace = 'notifyq'::regnamespace AND NOT tgisinternal
    UNION ALL
    SELECT 'view ' || relname, pg_get_viewdef(oid) FROM pg_class
    WHERE relnamespace = 'notifyq'::regnamespace AND relkind = 'v'
    UNION ALL
    SELECT 'type ' || typname, typtype::text FROM pg_type
    WHERE typnamespace = 'notifyq'::regnamespace AND typtype NOT IN ('c', 'b')
    UNION ALL
    SELECT 'rows of gate', count(*) || ' to ' || max(n) FROM notifyq.gate
    UNION ALL
    SELECT 'what version ' || max(version) || ' serves', max(serves)::text FROM notifyq.schema_version"""


async def catalogs(conn: Any) -> dict[str, str]:
    """Each object of the schema, and everything about it."""
    rows = await conn.fetch(CATALOGS)
    found = {row["what"]: row["how"] for row in rows}
    assert len(found) == len(rows) > 100
    return found


def differences(fresh: dict[str, str], upgraded: dict[str, str]) -> list[str]:
    return [
        f"{what}: schema.sql has {fresh.get(what)!r}, an upgrade {upgraded.get(what)!r}"
        for what in sorted({*fresh, *upgraded} - set(LEFT))
        if fresh.get(what) != upgraded.get(what)
    ]


@pytest.fixture
async def fresh(conn: Any) -> dict[str, str]:
    """The catalogs after an installation, which is gone again."""
    await schema.migrate(conn)
    found = await catalogs(conn)
    await drop(conn)
    return found


@pytest.mark.parametrize("version", EARLIER)
async def test_an_upgrade_makes_what_an_installation_makes(conn: Any, fresh: dict[str, str], version: int) -> None:
    """Whoever changes schema.sql and forgets notifyq/migrations, or the other way round, reads here what differs."""
    await install(conn, version)
    assert await schema.installed_version(conn) == version
    assert await schema.migrate(conn) == (version, SCHEMA_VERSION)
    upgraded = await catalogs(conn)
    assert differences(fresh, upgraded) == []
    assert set(LEFT) <= set(upgraded) - set(fresh), "LEFT has what isn't left"


def test_there_is_a_migration_to_each_version_and_a_frozen_schema_of_each_before() -> None:
    numbers = sorted(int(path.stem) for path in (Path(upgrade.__file__).parent / "migrations").glob("*.sql"))
    assert numbers == list(range(2, SCHEMA_VERSION + 1))
    assert list(range(1, SCHEMA_VERSION)) == EARLIER


def test_every_function_trigger_and_view_of_schema_sql_is_replaced() -> None:
    """The pattern takes each of them whole, and nothing else."""
    text = schema.schema_sql()
    wanted = re.findall(r"^CREATE (?:OR REPLACE )?(FUNCTION|TRIGGER|VIEW) (\S+?)[ (]", text, re.MULTILINE)
    replaced = upgrade.replaced(text)[:-1]
    names = [re.match(r"CREATE OR REPLACE (FUNCTION|TRIGGER|VIEW) (\S+?)[ (]", one) for one in replaced]
    assert sorted(match.groups() for match in names if match) == sorted(wanted)
    for one in replaced:
        assert len(re.findall(r"^CREATE ", one, re.MULTILINE)) == 1, one


@pytest.mark.parametrize("version", EARLIER)
async def test_an_interrupted_upgrade_is_run_again(conn: Any, fresh: dict[str, str], version: int) -> None:
    """After each step in turn, and after the last, which the answer to was lost. Until then the old version counts."""
    count = len(upgrade.steps(version, schema.schema_sql()))
    for stop in range(count):
        await install(conn, version)
        for step in upgrade.steps(version, schema.schema_sql())[:stop]:
            await conn.execute(step.sql)
        assert await schema.installed_version(conn) == version
        assert await schema.migrate(conn) == (version, SCHEMA_VERSION)
        assert differences(fresh, await catalogs(conn)) == [], f"after {stop} steps"
        await drop(conn)
