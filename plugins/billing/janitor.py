"""The janitor asks payment providers about orders whose payment began and of which no callback came.

One, five and thirty minutes after the payment began, and when the order is over: a lost callback is no
failed payment. An order that is over and was not paid is closed at its provider too. A provider that does
not answer is asked again, for a day.
"""

import asyncio
from typing import Final

from aiohttp import web

from plugins.billing.orders import payable
from plugins.billing.payments import PAYMENTS
from plugins.billing.providers import PROVIDERS, Provider, ProviderUnavailable
from server.db import DatabaseUnavailable, Record
from server.interfaces import DATABASE
from server.observe import log

ASK_AT_ONCE: Final = 8
ROUND: Final = 100
PAUSES_S: Final = (240.0, 1500.0)
"""Between the first question and the second, and the second and the third."""
RETRY_S: Final = 60.0
RETRY_MOST_S: Final = 3600.0
GIVE_UP_S: Final = 86400.0


class Janitor:
    """Asks after payments that are overdue."""

    def __init__(self, app: web.Application) -> None:
        self._database = app[DATABASE]
        self._payments = app[PAYMENTS]
        self._providers = app[PROVIDERS]
        self._asking = asyncio.Lock()  # guards: the questions under way, each asked once
        self._places = asyncio.Semaphore(ASK_AT_ONCE)

    async def ask(self) -> None:
        """Ask about every order that is due."""
        async with self._asking:
            asked = ROUND
            while asked == ROUND:
                rows = await self._database.fetch(
                    """
                    SELECT id, number, provider, amount, currency, state, created_at, expires_at,
                        provider_reference, asked, state <> 'pending' AS is_closed,
                        expires_at <= now() AS is_over,
                        expires_at <= now() - make_interval(secs => $2) AS is_given_up
                    FROM orders WHERE next_ask_at <= now() AND state <> 'paid'
                    ORDER BY next_ask_at LIMIT $1
                    """,
                    ROUND,
                    GIVE_UP_S,
                )
                async with asyncio.TaskGroup() as group:
                    for row in rows:
                        group.create_task(self._ask(row))
                asked = len(rows)

    async def _ask(self, order: Record) -> None:
        provider = self._providers.get(order["provider"])
        try:
            if provider is None:
                raise ProviderUnavailable("it is not configured any more")
            async with self._places:
                is_found = await self._settle(provider, order)
        except DatabaseUnavailable:
            raise
        except Exception as error:  # one order that cannot be asked about must not keep the others waiting
            log.warning(
                "a payment provider does not say whether an order is paid",
                extra={"provider": order["provider"], "order": order["number"], "error": repr(error)},
                exc_info=None if isinstance(error, ProviderUnavailable) else error,
            )
            retry_s = min(RETRY_S * 2 ** min(order["asked"], 10), RETRY_MOST_S)
            await self._note(order, None if order["is_given_up"] else retry_s, is_retry=True)
            return
        if is_found or order["is_over"]:
            await self._note(order, None)
        elif order["is_closed"] or order["asked"] >= len(PAUSES_S):
            await self._note(order, GIVE_UP_S)
        else:
            await self._note(order, PAUSES_S[order["asked"]])

    async def _settle(self, provider: Provider, order: Record) -> bool:
        """Whether the order's payment was found; without one the provider closes what is closed or over."""
        wanted = payable(order)
        found = await provider.query(wanted)
        if found is not None:
            await self._payments.settle(provider.name, found.event, found.body)
            return True
        if order["is_closed"] or order["is_over"]:
            await provider.close(wanted)
        return False

    async def _note(self, order: Record, pause_s: float | None, *, is_retry: bool = False) -> None:
        """When to ask next; the last question comes when the order is over."""
        await self._database.execute(
            """
            UPDATE orders SET asked = asked + 1, next_ask_at = CASE
                WHEN $2::double precision IS NULL THEN NULL
                WHEN $3 OR expires_at <= now() THEN now() + make_interval(secs => $2)
                ELSE least(now() + make_interval(secs => $2), expires_at)
            END
            WHERE id = $1 AND state <> 'paid'
            """,
            order["id"],
            pause_s,
            is_retry,
        )


JANITOR: Final = web.AppKey("JANITOR", Janitor)
