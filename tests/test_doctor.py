"""The doctor: what it asks, what it prints, and what it mends, with a plugin of the test's own."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from server.config import Configuration, load
from server.db import Database
from server.doctor import examine, repair
from server.interfaces import CONFIGURATION, DATABASE
from server.plugin import Check, CheckFailed, Plugin, Repair, Section
from tests.conftest import Open
from tests.house import House, port_ranges
from tests.process import ServerProcess, server_process
from tests.servers import Servers
from tests.test_serve import output, said


class CracksSection(Section):
    """[cracks]"""

    hidden: bool = False


@asynccontextmanager
async def lifespan(_app: web.Application) -> AsyncIterator[None]:
    yield


async def plan(database: Database, _configuration: Configuration) -> list[str]:
    return [f"close {row['what']}" for row in await database.fetch("SELECT what FROM cracks ORDER BY what")]


async def act(app: web.Application) -> list[str]:
    rows = await app[DATABASE].fetch("DELETE FROM cracks RETURNING what")
    return [f"close {what}" for what in sorted(row["what"] for row in rows)]


async def fails(_app: web.Application) -> str:
    raise CheckFailed("the wall\nis cracked", "fill 'the wall'")


async def fails_plainly(_app: web.Application) -> str:
    raise ValueError("is cracked\nin detail")


async def holds(app: web.Application) -> str:
    assert isinstance(app[CONFIGURATION].section("cracks"), CracksSection)
    return f"asked database {await app[DATABASE].fetchval('SELECT 6 * 7')}"


CRACKS = Plugin(
    name="cracks",
    config=CracksSection,
    lifespan=lifespan,
    migrations=("CREATE TABLE cracks (what text)",),
    checks=(
        Check("wall", fails, "never said", vital=False, in_readyz=False),
        Check("floor", fails_plainly, "sweep", vital=False, in_readyz=False),
        Check("door", holds, "", vital=False, in_readyz=False),
        Check("roof", fails_plainly, "thatch", applies=lambda section: not section.hidden),
    ),
    repair=Repair(plan, act),
)
SOUND = replace(CRACKS, checks=())


async def configured(house: House, *plugins: Plugin) -> Configuration:
    """What the house was started with, as the command line reads it."""
    return await asyncio.to_thread(load, house._file, plugins or (CRACKS,))


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines since the last time."""
    return capsys.readouterr().out.splitlines()


async def crack(house: House, *names: str) -> None:
    """Break something, behind the plugin's back."""
    for name in names:
        await house.app[DATABASE].execute("INSERT INTO cracks VALUES ($1)", name)


async def examined(house: House, capsys: pytest.CaptureFixture[str]) -> tuple[int, Sequence[str]]:
    """What the doctor answers and prints."""
    code = await examine(await configured(house), (CRACKS,))
    return code, printed(capsys)


# Checks


async def test_a_failure_brings_its_own_mend_and_fails_the_doctor_only_where_it_is_vital(
    open_house: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    house = await open_house((CRACKS,))
    await house.stop()
    code, lines = await examined(house, capsys)
    assert code == 1
    assert "warn  wall: the wall -- fill 'the wall'" in lines
    assert "warn  floor: is cracked -- sweep" in lines
    assert "ok    door: asked database 42" in lines
    assert "FAIL  roof: is cracked -- thatch" in lines


async def test_a_question_that_does_not_arise_is_left_out(
    open_house: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    house = await open_house((CRACKS,), cracks={"hidden": True})
    ready = await house.anyone.get("//readyz")
    assert (ready.status, set(ready.json["parts"])) == (200, {"database", "storage"})
    await house.stop()
    code, lines = await examined(house, capsys)
    assert code == 0, "a warning does not keep the server from starting"
    assert not any("roof" in line for line in lines)


async def test_only_what_is_asked_in_readyz_makes_it_fail(open_house: Open) -> None:
    for vital in (True, False):
        (roof,) = (replace(check, vital=vital) for check in CRACKS.checks if check.name == "roof")
        house = await open_house((replace(CRACKS, checks=(*CRACKS.checks[:3], roof)),))
        ready = await house.anyone.get("//readyz")
        assert ready.status == 503
        assert ready.json["parts"]["roof"] == {"state": "down", "detail": "is cracked"}
        assert set(ready.json["parts"]) == {"database", "storage", "roof"}


async def test_beside_a_server_the_doctor_asks_what_readyz_does_not(
    open_house: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    house = await open_house((CRACKS,))
    code, lines = await examined(house, capsys)
    assert code == 0
    assert "ok    door: asked database 42" in lines
    assert "warn  floor: is cracked -- sweep" in lines
    assert not any("roof" in line for line in lines)
    assert "runs already" in lines[-1]


# Repair


async def test_a_dry_run_says_what_would_be_mended_and_mends_nothing(
    open_house: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    house = await open_house((SOUND,))
    assert await repair(await configured(house), (SOUND,), dry_run=True) == 0
    assert printed(capsys) == ["nothing to repair"]
    await crack(house, "the wall", "the floor,\nall of it")
    expected = ["would  close the floor, all of it", "would  close the wall"]
    assert await repair(await configured(house), (SOUND,), dry_run=True) == 0
    assert printed(capsys) == expected, "beside a server"
    await house.stop()
    assert await repair(await configured(house), (SOUND,), dry_run=True) == 0
    assert printed(capsys) == expected, "without one"


async def test_a_repair_mends_once(open_house: Open, capsys: pytest.CaptureFixture[str]) -> None:
    house = await open_house((SOUND,))
    await crack(house, "wall", "floor")
    await house.stop()
    assert await repair(await configured(house), (SOUND,), dry_run=False) == 0
    assert printed(capsys) == ["mended close floor", "mended close wall"]
    assert await repair(await configured(house), (SOUND,), dry_run=False) == 0
    assert printed(capsys) == ["nothing to repair"]
    await house.start()
    assert await house.app[DATABASE].fetchval("SELECT count(*) FROM cracks") == 0


async def test_beside_a_server_a_repair_leaves_the_work_to_it(
    open_house: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    house = await open_house((SOUND,))
    await crack(house, "wall")
    assert await repair(await configured(house), (SOUND,), dry_run=False) == 0
    said_first, planned = printed(capsys)
    assert "the running server repairs by itself" in said_first
    assert planned == "would  close wall"
    assert await house.app[DATABASE].fetchval("SELECT count(*) FROM cracks") == 1


async def test_one_repair_that_fails_does_not_keep_the_others_from_theirs(
    open_house: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    async def gives_up(_app: web.Application) -> list[str]:
        raise OSError("out of plaster\nand more")

    ruin = Plugin(name="ruin", config=Section, lifespan=lifespan, repair=Repair(plan, gives_up))
    house = await open_house((ruin, SOUND))
    await crack(house, "wall")
    await house.stop()
    configuration = await configured(house, ruin, SOUND)
    assert await repair(configuration, (ruin, SOUND), dry_run=False) == 1
    assert printed(capsys) == ["FAIL  ruin: out of plaster", "mended close wall"]


async def test_a_repair_that_takes_for_ever_fails(
    open_house: Open, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(app: web.Application) -> list[str]:
        await app[DATABASE].fetchval("SELECT pg_sleep(4)")
        return []

    monkeypatch.setattr("server.doctor.REPAIR_DEADLINE_S", 0.2)
    slow = replace(SOUND, repair=Repair(plan, never))
    house = await open_house((slow,))
    await house.stop()
    assert await repair(await configured(house), (slow,), dry_run=False) == 1
    assert printed(capsys) == ["FAIL  cracks: no answer in time"]


async def test_a_dry_run_does_not_touch_a_database_of_another_version(
    open_house: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    house = await open_house((Plugin(name="cracks", config=CracksSection, lifespan=lifespan),))
    assert await repair(await configured(house), (SOUND,), dry_run=True) == 0
    assert printed(capsys) == ["nothing to repair"], "a database without its tables has nothing broken"
    assert await house.app[DATABASE].migrations_of("cracks") == 0
    older = await open_house((SOUND,))
    newer = replace(SOUND, migrations=(*SOUND.migrations, "ALTER TABLE cracks ADD wide boolean"))
    assert await repair(await configured(older), (newer,), dry_run=True) == 1
    (line,) = printed(capsys)
    assert line.startswith("FAIL  cracks: the database is of another version")
    assert await older.app[DATABASE].migrations_of("cracks") == 1


async def test_a_repair_that_cannot_start_says_why(
    open_house: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    house = await open_house((SOUND,))
    await house.stop()
    edited = replace(SOUND, migrations=("CREATE TABLE cracks (what text, where_ text)",))
    assert await repair(await configured(house), (edited,), dry_run=False) == 1
    (line,) = printed(capsys)
    assert line.startswith("FAIL  repair: cracks migration 1 was edited")


# The command


async def test_the_command_repairs_with_and_without_a_server(servers: Servers) -> None:
    sections: dict[str, dict[str, object]] = {
        "server": {"port": 0, "shutdown_grace_s": 5},
        **await servers.new_sections(),
        "devices": {"runtime": "simulated", **port_ranges()},
    }
    async with server_process(sections) as server:
        await server.launch("doctor", "--dry-run")
        assert await server.wait() == 2
        assert "--dry-run goes with --repair" in (await said(server))[-1]
        assert (await output(server, "doctor", "--repair", "--dry-run"))[-1] == "nothing to repair"
        assert (await output(server, "doctor", "--repair"))[-1] == "nothing to repair"
        await server.start()
        beside = ServerProcess(server.folder)
        *_, running, by_itself, nothing = await output(beside, "doctor", "--repair")
        assert str(server.pid) in running
        assert "repairs by itself" in by_itself
        assert nothing == "nothing to repair"
