"""Behind a reverse proxy: who really calls, as far as `server.trusted_proxies` may say so."""

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

Networks = Sequence[IPv4Network | IPv6Network]


def believing(trusted: Networks) -> Middleware:
    """A middleware that takes X-Forwarded-For, -Proto and -Host from these peers, and from no one else."""

    @web.middleware
    async def believe(request: web.Request, handler: Handler) -> web.StreamResponse:
        if trusted and _is_within(request.remote, trusted):
            request = _as_forwarded(request, trusted)
        return await handler(request)

    return believe


def _as_forwarded(request: web.Request, trusted: Networks) -> web.Request:
    addresses = ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")
    # Each proxy appends the peer it saw; what stands left of the first stranger may be made up.
    real = next((one.strip() for one in reversed(addresses) if not _is_within(one.strip(), trusted)), "")
    scheme = request.headers.get("X-Forwarded-Proto", request.scheme)
    host = request.headers.get("X-Forwarded-Host", request.host)
    return request.clone(
        remote=real if _is_address(real) else request.remote or "",
        scheme=scheme if scheme in {"http", "https"} else request.scheme,
        host=host,
    )


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _is_within(text: str | None, networks: Networks) -> bool:
    if not text or not _is_address(text):
        return False
    address = ip_address(text)
    return any(address in network for network in networks)
