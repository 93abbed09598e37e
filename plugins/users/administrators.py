"""`python -m server create-admin`."""

from pydantic import ValidationError

from plugins.users.model import NewUser, fold
from server.api import invalid
from server.clock import Randomness
from server.db import Database
from server.errors import Code, Problem
from server.passwords import Passwords


async def create_admin(database: Database, randomness: Randomness, email: str, password: str | None) -> str:
    """Make or promote an administrator; the sentence to print. A server beside it notices by itself.

    Without a password a new account gets one that is printed. Raises Problem(invalid).
    """
    async with Passwords.open(randomness.token()) as passwords, database.transaction() as tx:
        role = await tx.fetchval("SELECT role FROM users WHERE email_folded = $1 FOR UPDATE", fold(email))
        if role == "admin":
            return f"{email} is an administrator already."
        if role is not None:
            await tx.execute(
                "UPDATE users SET role = 'admin', updated_at = now() WHERE email_folded = $1", fold(email)
            )
            return f"{email} is an administrator now; the password stays as it was."
        try:
            new = NewUser(email=email, password=password or randomness.token(15))
        except ValidationError as error:
            faults = "; ".join(f"{name}: {message}" for name, message in invalid(error).errors)
            raise Problem(Code.INVALID, faults) from None
        await tx.execute(
            """
            INSERT INTO users (id, email, email_folded, password_hash, role) VALUES ($1, $2, $3, $4, 'admin')
            """,
            randomness.uuid(),
            new.email,
            fold(new.email),
            await passwords.hash(new.password),
        )
    secret = "" if password else f" The password is {new.password}"
    return f"{new.email} is an administrator now.{secret}"
