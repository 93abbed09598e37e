"""What billing asks of a payment provider."""

from collections.abc import Mapping
from typing import Final, Protocol

from aiohttp import web

from plugins.billing.model import PaymentEvent


class Provider(Protocol):
    """Somebody who takes users' money and says so in signed callbacks."""

    @property
    def name(self) -> str:
        """Its name in the callback's address and in orders."""

    def checkout_url(self, number: str, origin: str) -> str:
        """Where the order of this number is paid; `origin` is this server as its users reach it."""

    def read_callback(self, headers: Mapping[str, str], body: bytes) -> PaymentEvent:
        """What a callback says. Raises Problem: bad_signature; malformed or invalid where it is signed."""


PROVIDERS: Final[web.AppKey[Mapping[str, Provider]]] = web.AppKey("PROVIDERS", Mapping)
"""The providers that are fully configured, by name; the first one is used for new orders."""
