"""The network that an engine's phones share: out into the world, and to nowhere nearby.

A bridge on which containers cannot speak to each other (`enable_icc=false`), and a rule in the machine's
own firewall that lets nothing in from that bridge but answers: a phone is root in its container, so that
what keeps it from the machine's services must stand outside of it.

The rule is set with the machine's own iptables where that is at hand, else from a container in the
machine's network, with the iptables of the phone's image (Android has one, and so has the simulated phone's).
"""

import asyncio
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from phones.engine import Engine
from phones.runtime import RuntimeFault, RuntimeUnavailable

NAME_PREFIX: Final = "cloudphone-"
_TOOLS: Final = ("iptables", "ip6tables")
_RULE_DEADLINE_S: Final = 10.0
_ICC: Final = "com.docker.network.bridge.enable_icc"
_BRIDGE_NAME: Final = "com.docker.network.bridge.name"

log = logging.getLogger(__name__)


class PhoneNetwork:
    """One installation's network on one engine."""

    def __init__(self, engine: Engine, installation: str, label: str) -> None:
        """`label` marks as this installation's own what is made here."""
        short = installation[:8]
        self.name: Final = f"{NAME_PREFIX}{short}"
        self._bridge = f"cph-{short}"  # the kernel takes 15 characters
        self._gate_name = f"{NAME_PREFIX}{short}-gate"
        self._engine = engine
        self._label = label
        self._making = asyncio.Lock()  # guards: _is_made, _is_closed
        self._is_made = False
        self._is_closed = True
        """Whether phones are kept from the machine itself; not known to be otherwise before the first one."""

    @property
    def is_closed(self) -> bool:
        """Whether the machine's own services are out of the phones' reach, as far as is known."""
        return self._is_closed

    def forget(self) -> None:
        """Look again before the next phone: the engine or its machine may have started anew."""
        self._is_made = False

    async def ensure(self, image: str) -> None:
        """Have the network stand, closed towards the machine. `image` is a phone's, with iptables in it."""
        async with self._making:
            if self._is_made:
                return
            found = await self._engine.network(self.name)
            if found is None:
                await self._make()
                found = await self._engine.network(self.name)
            self._check(found or {})
            self._is_closed = all([await self._close(tool, image) for tool in _TOOLS])
            if not self._is_closed:
                log.error("phones can reach this machine's own services: no firewall rule could be set")
            self._is_made = True

    async def _make(self) -> None:
        key, _, value = self._label.partition("=")
        await self._engine.create_network(
            {
                "Name": self.name,
                "Driver": "bridge",
                "CheckDuplicate": True,
                "Labels": {key: value},
                "Options": {_BRIDGE_NAME: self._bridge, _ICC: "false"},
            }
        )

    def _check(self, found: dict[str, object]) -> None:
        """A network of this name that somebody else made might let phones meet. Raises RuntimeFault."""
        key, _, value = self._label.partition("=")
        labels, options = found.get("Labels"), found.get("Options")
        is_ours = isinstance(labels, dict) and labels.get(key) == value
        if not (is_ours and isinstance(options, dict) and options.get(_ICC) == "false"):
            raise RuntimeFault(f"the Docker network {self.name} is not the one made for phones; remove it")

    async def _close(self, tool: str, image: str) -> bool:
        """Have the rule stand that drops what phones send to the machine."""
        rule = ["INPUT", "-i", self._bridge, "-m", "conntrack", "!", "--ctstate", "ESTABLISHED,RELATED"]
        rule += ["-j", "DROP"]
        for run in (self._run_here, self._run_in_container):
            try:
                if await run(tool, ["-w", "-C", *rule], image) or await run(tool, ["-w", "-I", *rule], image):
                    return True
            except RuntimeUnavailable:
                raise
            except RuntimeFault as fault:
                log.info("%s could not be run: %s", tool, fault)
        return False

    async def _run_here(self, tool: str, arguments: Sequence[str], _image: str) -> bool:
        path = await asyncio.to_thread(self._tool_here, tool)
        if path is None:
            raise RuntimeFault("it is not on this machine, or phones are on another")
        process = await asyncio.create_subprocess_exec(
            path,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(_RULE_DEADLINE_S):
                return await process.wait() == 0
        except TimeoutError:
            raise RuntimeFault("it did not end") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def _tool_here(self, tool: str) -> str | None:
        """The path of this machine's own tool, if the phones' bridge is here too. Blocking."""
        if not Path("/sys/class/net", self._bridge).exists():
            return None
        return shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")

    async def _run_in_container(self, tool: str, arguments: Sequence[str], image: str) -> bool:
        key, _, value = self._label.partition("=")
        await self._engine.delete(self._gate_name)
        await self._engine.create(
            self._gate_name,
            {
                "Image": image,
                "Entrypoint": [tool],
                "Cmd": list(arguments),
                "User": "0",
                "Labels": {f"{key}.gate": value},
                "HostConfig": {
                    "NetworkMode": "host",
                    "CapDrop": ["ALL"],
                    "CapAdd": ["NET_ADMIN", "NET_RAW"],
                    "SecurityOpt": ["no-new-privileges"],
                    "Memory": 64 << 20,
                    "PidsLimit": 16,
                },
            },
        )
        try:
            await self._engine.start(self._gate_name)
            return await self._engine.wait(self._gate_name, _RULE_DEADLINE_S) == 0
        finally:
            await self._engine.delete(self._gate_name)
