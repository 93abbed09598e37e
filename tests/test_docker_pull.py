"""Images on their way to a real engine, from a registry that may be slow, sulky or silent."""

import asyncio
import gc
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import pytest

from phones import engine as engine_door
from phones import pulls as pulls_room
from phones.engine import Engine as EngineDoor
from phones.pulls import Pulls
from phones.runtime import RuntimeFault, RuntimeUnavailable
from tests.containers import OpenDocker
from tests.engine import Engine, docker
from tests.registry import Registry
from tests.renting import WISH, balance, becomes_gone, held_ports, settled, told, until

LAYERS = (300_000, 2_000_000)
OpenRegistry = Callable[..., AbstractAsyncContextManager[Registry]]


@pytest.fixture
def open_registry(engine: Engine) -> OpenRegistry:
    """Start a registry: `async with open_registry(*layer_sizes)`. The engine forgets what came from it."""

    @asynccontextmanager
    async def open_one(*layer_sizes: int) -> AsyncIterator[Registry]:
        async with Registry.started(*(layer_sizes or LAYERS)) as registry:
            try:
                yield registry
            finally:
                with suppress(RuntimeError):
                    await docker("image", "rm", registry.reference, url=engine.url)

    return open_one


@pytest.fixture
async def pulls(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pulls]:
    """Pulls on the machine's engine that tell often."""
    monkeypatch.setattr(pulls_room, "TELL_EVERY_S", 0.05)
    door = EngineDoor(engine.url)
    pulls = Pulls(door)
    yield pulls
    await pulls.close()
    await door.close()


async def followed(pulls: Pulls, reference: str) -> list[int]:
    """What somebody hears who follows a pull to its end."""
    return [percent async for percent in pulls.follow(reference)]


def rises(percents: list[int]) -> bool:
    """Whether it went from little to much, and never back."""
    return percents == sorted(percents) and percents[0] < 30 and percents[-1] > 70 and percents[-1] <= 100


async def arrives(registry: Registry) -> None:
    """Wait until the engine fetches a layer."""

    async def asked() -> bool:
        return bool(registry.asked_for)

    await until(asked)


async def breaks_off(registry: Registry) -> None:
    """Wait until the engine fetches no layer any more, which it does not before the next bytes come."""
    registry.stalls_after = None

    async def quiet() -> bool:
        return registry.sending == 0

    await until(quiet, deadline_s=5)


# The pull itself


async def test_progress_rises_to_the_end_and_then_the_image_is_there(
    engine: Engine, pulls: Pulls, open_registry: OpenRegistry
) -> None:
    door = EngineDoor(engine.url)
    try:
        async with open_registry() as registry:
            registry.bytes_per_s = 2_000_000
            percents = [percent async for percent in door.pull(registry.reference)]
            assert rises(percents)
            assert len(set(percents)) == len(percents) > 5
            assert percents[-1] == 100
            assert await door.has_image(registry.reference)
            assert await pulls.has(registry.reference)
            assert await followed(pulls, registry.reference) == [], "what is there is not fetched"
            assert sorted(registry.asked_for) == sorted(registry.layers)
    finally:
        await door.close()


async def test_an_image_without_a_tag_is_the_latest(
    engine: Engine, pulls: Pulls, open_registry: OpenRegistry
) -> None:
    async with open_registry() as registry:
        untagged = registry.reference.removesuffix(":1")
        try:
            await followed(pulls, untagged)
            assert await pulls.has(untagged)
            tags = ("image", "ls", "--format", "{{.Tag}}", untagged)
            assert await docker(*tags, url=engine.url) == "latest"
        finally:
            await docker("image", "rm", f"{untagged}:latest", url=engine.url)


async def test_a_small_layer_that_comes_first_does_not_pass_for_the_whole_image(
    engine: Engine, pulls: Pulls, open_registry: OpenRegistry
) -> None:
    # An engine fetches three layers at once, and learns the size of the others later.
    async with open_registry(1, 1, 1, 1_000_000, 1_000_000, 1_000_000) as registry:
        registry.bytes_per_s = 300_000
        percents = await followed(pulls, registry.reference)
        assert len([percent for percent in set(percents) if 0 < percent < 100]) > 5, percents
        assert rises(percents)


async def test_two_who_wait_for_one_image_cause_one_pull(pulls: Pulls, open_registry: OpenRegistry) -> None:
    async with open_registry() as registry:
        registry.bytes_per_s = 2_000_000
        first = asyncio.create_task(followed(pulls, registry.reference))
        await arrives(registry)
        heard = await asyncio.gather(first, followed(pulls, registry.reference))
        assert all(rises(percents) for percents in heard)
        assert sorted(registry.asked_for) == sorted(registry.layers)


async def test_who_stops_waiting_leaves_the_pull_to_the_others(
    pulls: Pulls, open_registry: OpenRegistry
) -> None:
    async with open_registry() as registry:
        registry.bytes_per_s = 2_000_000
        waiting = [asyncio.create_task(followed(pulls, registry.reference)) for _ in range(2)]
        await arrives(registry)
        waiting[0].cancel()
        assert rises(await waiting[1])
        assert await pulls.has(registry.reference)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, "manifest unknown"),
        (401, "unauthorized"),
        (500, "received unexpected HTTP status: 500 Internal Server Error"),
    ],
)
async def test_a_registry_that_refuses_is_quoted(
    status: int, reason: str, pulls: Pulls, open_registry: OpenRegistry
) -> None:
    async with open_registry() as registry:
        registry.refuses_with = status
        with pytest.raises(RuntimeFault) as refused:
            await followed(pulls, registry.reference)
        assert str(refused.value) == f"the image {registry.reference} cannot be had: {reason}"
        assert not isinstance(refused.value, RuntimeUnavailable)
        registry.refuses_with = None
        assert await followed(pulls, registry.reference), "the next one asks anew"


async def test_a_registry_that_is_not_there_is_named(pulls: Pulls, open_registry: OpenRegistry) -> None:
    async with open_registry() as registry:
        pass
    with pytest.raises(RuntimeFault) as refused:
        await followed(pulls, registry.reference)
    expected = f"the image {registry.reference} cannot be had: 127.0.0.1:{registry.port}: connection refused"
    assert str(refused.value) == expected


async def test_a_registry_that_falls_silent_is_given_up(
    pulls: Pulls, open_registry: OpenRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_door, "PULL_STALL_S", 0.5)
    async with open_registry() as registry:
        registry.stalls_after = 100_000
        began = time.monotonic()
        with pytest.raises(RuntimeFault, match=r"cannot be had: nothing arrived for 0\.5 s$"):
            await followed(pulls, registry.reference)
        assert 0.5 <= time.monotonic() - began < 3
        await breaks_off(registry)
        assert not await pulls.has(registry.reference)
        registry.bytes_per_s = None
        assert await followed(pulls, registry.reference), "the next one goes on"
        assert await pulls.has(registry.reference)


async def test_a_close_ends_a_pull_and_whoever_waits_for_it(
    pulls: Pulls, open_registry: OpenRegistry
) -> None:
    async with open_registry(5_000_000) as registry:
        registry.bytes_per_s = 500_000
        waiting = asyncio.create_task(followed(pulls, registry.reference))
        await arrives(registry)
        began = time.monotonic()
        await pulls.close()
        with pytest.raises(RuntimeUnavailable, match="broken off"):
            await waiting
        assert time.monotonic() - began < 1
        await breaks_off(registry)


async def test_a_pull_that_fails_when_nobody_waits_any_more_says_nothing(
    pulls: Pulls, open_registry: OpenRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    monkeypatch.setattr(engine_door, "PULL_STALL_S", 0.3)
    async with open_registry() as registry:
        registry.stalls_after = 100_000
        waiting = asyncio.create_task(followed(pulls, registry.reference))
        await arrives(registry)
        waiting.cancel()
        await asyncio.sleep(0.6)
        assert await asyncio.to_thread(gc.collect) >= 0
        assert complaints == []
        await breaks_off(registry)


# Through the server


def on_registry(registry: Registry) -> dict[str, object]:
    """What of the configuration makes phones of the registry's image."""
    return {"images": [{"name": "android-12", "kind": "redroid", "reference": registry.reference}]}


async def test_an_owner_sees_how_far_the_image_is_and_pays_nothing(
    docker_house: OpenDocker, open_registry: OpenRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls_room, "TELL_EVERY_S", 0.1)
    async with open_registry() as registry:
        registry.bytes_per_s = 700_000
        there = await docker_house(start_deadline_s=0.5, **on_registry(registry))
        owner = await there.house.sign_up()
        before = await balance(owner)
        began = time.monotonic()
        device = (await owner.post("/devices", WISH)).json
        english: list[int] = []
        chinese: list[int] = []

        async def listen() -> bool:
            path = f"/devices/{device['id']}"
            seen = (await owner.get(path)).json
            if seen["state"] == "failed":
                return True
            if found := re.fullmatch(
                r"The Android image is being downloaded: (\d+) %", seen["state_detail"] or ""
            ):
                english.append(int(found[1]))
            seen = (await owner.get(path, headers={"Accept-Language": "zh-CN"})).json
            if found := re.fullmatch(r"正在下载 Android 镜像：(\d+)%", seen["state_detail"] or ""):
                chinese.append(int(found[1]))
            return False

        await until(listen)
        assert time.monotonic() - began > 4 * 0.5, "the deadline of a start does not run meanwhile"
        assert rises(english)
        assert rises(chinese)
        assert len(set(english)) > 5
        heard = [item for item in await told(owner) if item["data"]["state"] == "creating"]
        words = [item for item in heard if "being downloaded" in (item["data"]["detail"] or "")]
        assert [item["title"] for item in words] == ["mine waits for its Android image"] + [""] * (
            len(words) - 1
        )
        assert 3 < len(words) <= 12, "one now and again"
        failed = await settled(owner, device["id"], "failed")
        assert failed["state_detail"] == (  # the image is no Android
            'The phone could not be started: exec: "androidboot.redroid_width=720":'
            " executable file not found in $PATH"
        )
        assert (failed["ports"], failed["started_at"]) == (None, None)
        assert await held_ports(there.house) == 0
        assert await balance(owner) == before
        assert (await owner.delete(f"/devices/{device['id']}")).status == 202
        assert await becomes_gone(owner, device["id"], wait=True)
        await there.house.stop()
        assert await there.containers() == {}


async def test_an_image_that_cannot_be_had_fails_the_phone_with_the_registrys_words(
    docker_house: OpenDocker, open_registry: OpenRegistry
) -> None:
    async with open_registry() as registry:
        registry.refuses_with = 404
        there = await docker_house(**on_registry(registry))
        owner = await there.house.sign_up()
        before = await balance(owner)
        device = (await owner.post("/devices", WISH)).json
        failed = await settled(owner, device["id"], "failed")
        assert failed["state_detail"] == (
            f"The phone could not be started: the image {registry.reference} cannot be had: manifest unknown"
        )
        assert await held_ports(there.house) == 0
        assert await balance(owner) == before


async def test_a_delete_does_not_wait_for_the_image(
    docker_house: OpenDocker, open_registry: OpenRegistry
) -> None:
    async with open_registry() as registry:
        registry.stalls_after = 100_000
        there = await docker_house(operations_at_once=1, **on_registry(registry))
        owner = await there.house.sign_up()
        device = (await owner.post("/devices", WISH)).json
        await arrives(registry)
        assert (await owner.delete(f"/devices/{device['id']}")).status == 202
        async with asyncio.timeout(3):
            assert await becomes_gone(owner, device["id"], wait=True)
        assert await held_ports(there.house) == 0
        began = time.monotonic()
        await there.house.stop()
        assert time.monotonic() - began < 5
        await breaks_off(registry)
