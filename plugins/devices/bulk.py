"""One action on many devices: each is treated as by its single call, and answered beside the others."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final
from uuid import UUID

from plugins.devices.model import ActionDone, ActionRefused, ActionResults, DeviceAction, Rented
from plugins.devices.room import Devices
from server.auth import Caller
from server.errors import Code, as_problem
from server.observe import log

AT_ONCE: Final = 8
ACCEPTED: Final = 202

Operation = Callable[[Caller, UUID], Awaitable[Rented]]


async def act(devices: Devices, caller: Caller, action: DeviceAction, ids: Sequence[UUID]) -> ActionResults:
    """Do it to every device, eight at once; one that is named again is done and answered once."""
    operation = _operations(devices)[action]
    room = asyncio.Semaphore(AT_ONCE)  # guards: the database's connections, which others need too

    async def one(device_id: UUID) -> ActionRefused | ActionDone:
        async with room:
            return await _result(operation, caller, device_id)

    return ActionResults(results=await asyncio.gather(*map(one, dict.fromkeys(ids))))


def _operations(devices: Devices) -> Mapping[DeviceAction, Operation]:
    return {
        DeviceAction.START: devices.start,
        DeviceAction.STOP: devices.stop,
        DeviceAction.RESTART: devices.restart,
        DeviceAction.RESET: devices.reset,
        DeviceAction.DELETE: devices.delete,
    }


async def _result(operation: Operation, caller: Caller, device_id: UUID) -> ActionRefused | ActionDone:
    """What the device's single call answers. One that fails keeps nobody from hearing of the others."""
    try:
        await operation(caller, device_id)
    except Exception as error:
        code = as_problem(error).code
        if code is Code.INTERNAL:
            log.exception("unforeseen error", extra={"device": str(device_id)})
        return ActionRefused(id=device_id, status=code.status, code=code)
    return ActionDone(id=device_id, status=ACCEPTED)
