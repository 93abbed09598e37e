"""What the layers of one request leave for each other on it."""

from typing import Any, Final

from aiohttp import web

REQUEST_ID: Final = web.RequestKey("REQUEST_ID", str)
CALLER: Final[web.RequestKey[Any]] = web.RequestKey("CALLER", object)
"""server.auth's Caller, or None where nobody is signed in."""
UNLOGGED: Final = web.RequestKey("UNLOGGED", bool)
"""Whether an answer without fault leaves a row of its own, and needs no line in the log."""
PAGE_CSRF: Final = web.RequestKey("PAGE_CSRF", str)
"""The token a page of this session carries in its forms."""
BEGUN: Final[web.RequestKey[web.StreamResponse]] = web.RequestKey("BEGUN", web.StreamResponse)
"""The answer that is on its way already."""
