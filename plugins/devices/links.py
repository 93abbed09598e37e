"""ADB connections to running phones: one a phone, opened when first needed and shared."""

from uuid import UUID

from phones.adb import AdbClient
from plugins.devices.model import Rented
from server.locks import KeyedLocks

CONNECT_DEADLINE_S = 5.0


class Links:
    """The open connections."""

    def __init__(self, host: str) -> None:
        """`host` is where phones' ports are reached."""
        self._host = host
        self._open: dict[UUID, tuple[int, AdbClient]] = {}
        self._locks = KeyedLocks[UUID]()  # guards: one phone's entry in _open

    async def to(self, device: Rented) -> AdbClient:
        """The phone's connection, made anew where it broke. Raises AdbUnreachable."""
        assert device.ports is not None
        port = device.ports.adb
        async with self._locks.of(device.id):
            known_port, client = self._open.get(device.id, (0, None))
            if client is not None:
                if not client.closed and known_port == port:
                    return client
                await self._drop(device.id)
            client = await AdbClient.connect(self._host, port, CONNECT_DEADLINE_S)
            self._open[device.id] = (port, client)
            return client

    async def close(self, device_id: UUID) -> None:
        """Hang up; what is under way ends with AdbUnreachable."""
        async with self._locks.of(device_id):
            await self._drop(device_id)

    async def close_all(self) -> None:
        """Hang up everywhere."""
        for device_id in list(self._open):
            await self.close(device_id)

    async def _drop(self, device_id: UUID) -> None:
        _, client = self._open.pop(device_id, (0, None))
        if client is not None:
            await client.close()
