"""How fast payments are booked, beside PostgreSQL's own speed: `python -m benchmarks.payments [seconds]`.

A `python -m server` in a temporary folder, on a private PostgreSQL that is durable as it comes and takes
more connections, is sent signed callbacks of distinct pending orders over loopback by another process, each
once. Then pgbench does on the same PostgreSQL, in the same tables, what one callback makes the database do:
one transaction and nine statements, prepared, for a distinct order each. Every payment moves money out of
the same `clearing` account: whoever books one at a time waits there for the commit before. So pgbench also
runs without that row's update, which leaves a ledger that is wrong. Callbacks shall be 1.5 times as fast as
its fastest run of the same transaction, and are compared to the other as well.

Neither has to share with the other: they take turns, callbacks first and last. Each runs for the given
seconds (default 6; at most 8, so that all of it ends within two minutes). Processor time is that of the
server and of its PostgreSQL; pgbench's and the load generator's own are not counted.
"""

import argparse
import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

from benchmarks.load import Job, drive_apart, percentile
from server.db import Database
from server.embedded_postgres import EmbeddedPostgres
from tests.paying import signature
from tests.process import ServerProcess, server_process

SECRET: Final = "a secret of the benchmark"
USERS: Final = 2000
AMOUNT: Final = 500
CONNECTIONS: Final = (20, 64, 128)
CLIENTS: Final = (20, 64)
MOST_A_SECOND: Final = 9000
"""How many orders are made for each second that somebody books them."""
LONGEST_S: Final = 8.0
AIM: Final = 1.5

FIRST_STATEMENTS: Final = r"""
\set i :i + 1
\set n :first + :i * :clients + :client_id
\set owed - :amount
BEGIN;
INSERT INTO payment_events AS e
    (provider, event_id, order_number, amount, currency, status, payment_id, body, deliveries)
    VALUES ('sandbox', :n, :n, :amount, 'CNY', 'succeeded', '', :body, 1)
    ON CONFLICT (provider, event_id) DO UPDATE SET deliveries = e.deliveries + excluded.deliveries
    RETURNING deliveries;
SELECT id AS order_id, user_id, amount, currency, state FROM orders WHERE number = :n FOR NO KEY UPDATE \gset
INSERT INTO payments (order_id, payment_id, amount, state, reason)
    VALUES (:order_id, '', :amount, 'credited', '')
    ON CONFLICT (order_id, payment_id) DO NOTHING RETURNING order_id;
UPDATE orders SET state = 'paid', paid_at = now(), next_ask_at = NULL
    WHERE id = :order_id AND state = 'pending';
UPDATE ledger_accounts SET balance = balance + :amount WHERE user_id = :user_id
    RETURNING id AS account_id, balance AS balance_after \gset
"""
CLEARING: Final = r"""
UPDATE ledger_accounts SET balance = balance - :amount WHERE id = :clearing
    RETURNING balance AS cleared_after \gset
"""
LAST_STATEMENTS: Final = r"""
INSERT INTO ledger_entries (transaction_id, account_id, amount, balance_after, kind, reference)
    VALUES (:order_id, :account_id, :amount, :balance_after, 'top_up', :n),
        (:order_id, :clearing, :owed, :cleared_after, 'top_up', :n);
INSERT INTO notification_counters AS kept (user_id, last_id, unread, revision) VALUES (:user_id, 2, 2, 1)
    ON CONFLICT (user_id) DO UPDATE
        SET last_id = kept.last_id + 2, unread = kept.unread + 2, revision = kept.revision + 1
    RETURNING last_id \gset
INSERT INTO notifications (user_id, id, topic, title, body, params, data) VALUES
    (:user_id, :last_id - 1, 'billing.order', 'Order {number} is paid', 'The amount is in your balance.',
        :order_params, :order_data),
    (:user_id, :last_id, 'billing.balance', 'Your balance is {balance}', '{amount} were added.',
        :balance_params, :balance_data);
COMMIT;
"""


@dataclass(frozen=True)
class Rate:
    """What somebody booked: payments a second, and how long one took."""

    payments: int
    elapsed_s: float
    p50_ms: float
    p99_ms: float

    @property
    def a_second(self) -> float:
        """Payments a second."""
        return self.payments / self.elapsed_s


class Bench:
    """A server and its PostgreSQL, and orders to be paid."""

    def __init__(
        self, server: ServerProcess, database: Database, url: str, postmaster: int, seconds: float
    ) -> None:
        self._server = server
        self._database = database
        self._url = url
        self._seconds = seconds
        self._next_order = 10**9
        self._postmaster = postmaster
        self._pgbench = _find_pgbench(Path(f"/proc/{postmaster}/exe"))

    async def add_users(self) -> None:
        """Accounts to top up."""
        await self._database.execute(
            "INSERT INTO users (id, email, email_folded, password_hash)"
            " SELECT gen_random_uuid(), n, n, '' FROM generate_series(1, $1::int) n",
            USERS,
        )
        await self._database.execute(
            "INSERT INTO ledger_accounts (kind, user_id, currency) SELECT 'user', id, 'CNY' FROM users"
        )

    async def _add_orders(self) -> range:
        """Numbers of fresh orders, neighbours with different owners, in a database that has come to rest."""
        numbers = range(self._next_order, self._next_order + int(MOST_A_SECOND * self._seconds))
        self._next_order = numbers.stop
        for some in range(numbers.start, numbers.stop, 10_000):
            await self._database.execute(
                """
                INSERT INTO orders (id, number, user_id, provider, amount, currency, expires_at)
                SELECT gen_random_uuid(), n, u.id, 'sandbox', $3, 'CNY', now() + interval '1 day'
                FROM generate_series($1::bigint, $2::bigint) n
                JOIN (SELECT id, row_number() OVER () - 1 AS place FROM users) u ON u.place = n % $4
                ORDER BY n
                """,
                some,
                min(some + 10_000, numbers.stop) - 1,
                AMOUNT,
                USERS,
            )
        await self._database.execute("ANALYZE")
        await self._database.execute("CHECKPOINT")
        return numbers

    async def callbacks(self, connections: int) -> Rate:
        """Send callbacks over HTTP and print a row."""
        numbers = await self._add_orders()
        parts = urlsplit(self._server.url)
        assert parts.hostname
        assert parts.port
        requests = [_callback(parts.netloc, number) for number in numbers]
        before = self._cpu_s(), self._postgres_cpu_s()
        job = Job(parts.hostname, parts.port, connections, self._seconds, requests, once=True)
        result = await drive_apart(job)
        server_s, postgres_s = self._cpu_s() - before[0], self._postgres_cpu_s() - before[1]
        if set(result.statuses) != {"200"}:
            raise RuntimeError(f"unexpected answers: {result.statuses}")
        rate = Rate(result.answers, result.elapsed_s, result.p50_ms, result.p99_ms)
        _row(f"callbacks, {connections} connections", rate, postgres_s, server_s)
        return rate

    async def transactions(self, clients: int, *, with_clearing: bool) -> Rate | None:
        """Let pgbench do the same, and print a row; None without pgbench."""
        if self._pgbench is None:
            return None
        numbers = await self._add_orders()
        clearing = await self._database.fetchval("SELECT id FROM ledger_accounts WHERE kind = 'clearing'")
        values = _texts_of_callback() | {
            "i": "-1",
            "first": str(numbers.start),
            "clients": str(clients),
            "amount": str(AMOUNT),
            "clearing": str(clearing),
            "cleared_after": "0",
        }
        script = FIRST_STATEMENTS + CLEARING * with_clearing + LAST_STATEMENTS
        before_s = self._postgres_cpu_s()
        rate = await self._run(self._pgbench, clients, script, values)
        title = f"pgbench, {clients} clients" + ("" if with_clearing else ", no clearing row")
        _row(title, rate, self._postgres_cpu_s() - before_s)
        return rate

    async def _run(self, pgbench: str, clients: int, script: str, values: Mapping[str, str]) -> Rate:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "payment.sql").write_text(script)
            process = await asyncio.create_subprocess_exec(
                pgbench,
                *("--no-vacuum", "--protocol=prepared", f"--client={clients}", "--jobs=2"),
                *(f"--time={self._seconds:.0f}", "--file=payment.sql", "--log", "--log-prefix=taken"),
                *(f"--define={name}={value}" for name, value in values.items()),
                cwd=folder,
                env=_environment(self._url),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                async with asyncio.timeout(self._seconds + 30):
                    said, _ = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            if process.returncode or b"aborted" in said:
                raise RuntimeError(f"pgbench failed:\n{said.decode()[:1000]}")
            # A line for each transaction; its third word is how long it took, in microseconds.
            taken_us = [
                int(line.split()[2])
                for file in Path(folder).glob("taken*")
                for line in file.read_text().splitlines()
            ]
        tps = float(said.decode().partition("tps = ")[2].split()[0])
        p50_ms, p99_ms = (percentile(taken_us, share) / 1000 for share in (0.5, 0.99))
        return Rate(len(taken_us), len(taken_us) / tps, p50_ms, p99_ms)  # connecting takes time of its own

    async def settings(self) -> str:
        """What PostgreSQL is told about durability and memory."""
        rows = await self._database.fetch(
            "SELECT name, current_setting(name) AS value FROM unnest($1::text[]) AS one (name)",
            ["fsync", "synchronous_commit", "full_page_writes", "wal_sync_method", "shared_buffers", "jit"],
        )
        version = await self._database.fetchval("SHOW server_version")
        return f"PostgreSQL {version}: " + ", ".join(f"{row['name']} {row['value']}" for row in rows)

    def _cpu_s(self) -> float:
        return _cpu_s_of(self._server.pid)

    def _postgres_cpu_s(self) -> float:
        """The processor time of PostgreSQL: its processes, those that ended among them."""
        own = Path(f"/proc/{self._postmaster}/stat").read_text().rpartition(")")[2].split()
        ended_s = (int(own[13]) + int(own[14])) / os.sysconf("SC_CLK_TCK")
        children = Path(f"/proc/{self._postmaster}/task/{self._postmaster}/children").read_text().split()
        return ended_s + _cpu_s_of(self._postmaster) + sum(_cpu_s_of(int(pid)) for pid in children)


def _cpu_s_of(pid: int) -> float:
    """proc(5): user and system time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _find_pgbench(postgres: Path) -> str | None:
    """The one that came with this PostgreSQL, else any."""
    beside = postgres.resolve().with_name("pgbench")
    others = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"), reverse=True)
    found = [str(path) for path in (beside, *others) if path.is_file()]
    return found[0] if found else shutil.which("pgbench")


def _environment(url: str) -> dict[str, str]:
    """libpq's variables: a password among the arguments could be read by anybody."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    return {
        "PATH": os.environ["PATH"],
        "PGHOST": query["host"][0],
        "PGPORT": query["port"][0],
        "PGUSER": parts.username or "",
        "PGPASSWORD": parts.password or "",
        "PGDATABASE": parts.path.removeprefix("/"),
    }


def _body(number: int) -> str:
    return json.dumps(
        {
            "event_id": uuid4().hex,
            "order_number": str(number),
            "amount": AMOUNT,
            "currency": "CNY",
            "status": "succeeded",
            "occurred_at": "2030-01-01T00:00:00Z",
        }
    )


def _texts_of_callback() -> dict[str, str]:
    """What pgbench stores, as long as what the server does."""
    moved = {"balance": AMOUNT, "amount": AMOUNT, "currency": "CNY", "kind": "top_up"}
    order = {"order_id": str(uuid4()), "number": str(10**9), "state": "paid", "amount": AMOUNT}
    return {
        "body": _body(10**9),
        "order_params": json.dumps({"number": str(10**9)}),
        "order_data": json.dumps(order | {"currency": "CNY"}),
        "balance_params": json.dumps({"balance": "5.00 CNY", "amount": "5.00 CNY"}),
        "balance_data": json.dumps(moved),
    }


def _callback(host: str, number: int) -> str:
    """A whole HTTP request."""
    body = _body(number)
    lines = [
        "POST /api/v1/billing/payments/sandbox HTTP/1.1",
        f"Host: {host}",
        f"X-Signature: {signature(body.encode(), secret=SECRET)}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", body])


def _row(title: str, rate: Rate, postgres_s: float, server_s: float | None = None) -> None:
    columns = [f"{rate.a_second:,.0f}", f"{rate.p50_ms:.1f}", f"{rate.p99_ms:.1f}"]
    if server_s is None:
        columns += ["", ""]
    else:
        columns += [f"{rate.payments / server_s:,.0f}", f"{server_s / rate.elapsed_s:.2f}"]
    columns += [f"{postgres_s / rate.elapsed_s:.2f}", f"{os.getloadavg()[0]:.1f}"]
    print(f"{title:<38}" + "".join(f"{column:>10}" for column in columns), flush=True)


async def main(seconds: float) -> None:
    """Measure everything once."""
    sections: dict[str, dict[str, object]] = {
        "server": {"port": 0},
        "devices": {"runtime": "simulated"},
        "billing": {"providers": {"sandbox": {"secret": SECRET}}},
    }
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cloudphone-")))
        folder.chmod(0o711)  # a PostgreSQL that root starts runs as nobody, who has to get in
        postgres = EmbeddedPostgres(folder, settings={"max_connections": str(2 * max(CLIENTS))})
        stack.push_async_callback(postgres.stop)
        url = await postgres.start()
        assert postgres.pid
        server = await stack.enter_async_context(server_process({**sections, "database": {"url": url}}))
        await server.start()
        database = await Database.open(url, pool_size=2)
        stack.push_async_callback(database.close)
        await _compare(Bench(server, database, url, postgres.pid, seconds))


async def _compare(bench: Bench) -> None:
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; {await bench.settings()}\n")
    heads = ("a second", "p50 ms", "p99 ms", "per CPU-s", "server", "postgres", "load")
    print(f"{'':<38}" + "".join(f"{head:>10}" for head in heads))
    await bench.add_users()
    await bench.callbacks(CONNECTIONS[-1])  # the server's and the database's caches are filled
    booked = [await bench.callbacks(connections) for connections in CONNECTIONS]
    same = [await bench.transactions(clients, with_clearing=True) for clients in CLIENTS]
    less = [await bench.transactions(clients, with_clearing=False) for clients in CLIENTS]
    again = [await bench.callbacks(connections) for connections in CONNECTIONS]
    _judge("the same transaction", booked, again, [rate for rate in same if rate is not None])
    _judge("without the clearing row", booked, again, [rate for rate in less if rate is not None])


def _judge(what: str, booked: Sequence[Rate], again: Sequence[Rate], bare: Sequence[Rate]) -> None:
    if not bare:
        print("\nThere is no pgbench: apt-get install postgresql-contrib")
        return
    measure = max(rate.a_second for rate in bare)
    print(f"\nin units of pgbench's fastest run of {what} ({measure:,.0f} a second); the aim is {AIM:g}:")
    for connections, first, last in zip(CONNECTIONS, booked, again, strict=True):
        before, after = first.a_second / measure, last.a_second / measure
        print(f"  callbacks, {connections} connections: {before:.2f} before it, {after:.2f} after it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure payment callbacks beside pgbench.")
    parser.add_argument("seconds", nargs="?", type=float, default=6.0, help="how long each row runs")
    asyncio.run(main(min(parser.parse_args().seconds, LONGEST_S)))
