"""What notifications look like: to the outside, and as they are stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import orjson
from pydantic import AfterValidator, BaseModel, Field

from server.api import Incoming, Moment, Outgoing, PageQuery, Query
from server.db import Record
from server.i18n import N_, translate
from server.interfaces import Topic
from server.plugin import Section

LARGEST_ID: Final = 2**63 - 1
DATA_LIMIT_BYTES: Final = 8192


class NotifySection(Section):
    """[notify]"""

    heartbeat_s: Annotated[float, Field(ge=1, le=3600)] = 25
    retention_days: Annotated[int, Field(ge=1, le=36500)] = 90


def _small(data: dict[str, Any]) -> dict[str, Any]:
    try:
        size_bytes = len(orjson.dumps(data))
    except TypeError:  # nested too deeply, or an integer of more than 64 bits
        raise ValueError(N_("This cannot be stored.")) from None
    if size_bytes > DATA_LIMIT_BYTES:
        raise ValueError(N_("This is too much."))
    return data


class NewNotification(Incoming):
    """What an administrator tells one user or all."""

    user_id: UUID | Literal["all"]
    topic: Topic
    title: Annotated[str, Field(min_length=1, max_length=200)]
    body: Annotated[str, Field(max_length=2000)]
    data: Annotated[dict[str, Any], AfterValidator(_small)] = Field(default_factory=dict)


class Accepted(Outgoing):
    """How many users were told."""

    recipients: int


class ReadUpTo(Incoming):
    """Everything up to here was read."""

    up_to_id: Annotated[int, Field(ge=0, le=LARGEST_ID)]


class ReadForm(BaseModel):
    """The same, as the page posts it."""

    up_to_id: Annotated[int, Field(ge=0, le=LARGEST_ID)]


class ListQuery(PageQuery):
    """Which notifications."""

    since: Annotated[int, Field(ge=0)] = 0
    unread: bool = False


class StreamQuery(Query):
    """The last notification a reader saw; without it only new ones are streamed."""

    since: Annotated[int, Field(ge=0)] | None = None


class Notification(Outgoing):
    """Something a user was told; `id` counts 1, 2, 3 … for each user."""

    id: int
    topic: Topic
    title: str
    body: str
    data: dict[str, Any]
    created_at: Moment
    read_at: Moment | None


@dataclass(frozen=True, slots=True)
class Letter:
    """A stored notification, in no language yet. Without `params` its words are taken as they are."""

    id: int
    topic: str
    title: str
    body: str
    params: Mapping[str, object] | None
    data: dict[str, Any]
    created_at: datetime
    read_at: datetime | None

    @classmethod
    def of(cls, row: Record) -> "Letter":
        """The letter in a row."""
        return cls(
            id=row["id"],
            topic=row["topic"],
            title=row["title"],
            body=row["body"],
            params=row["params"],
            data=row["data"],
            created_at=row["created_at"],
            read_at=row["read_at"],
        )

    def translated(self, locale: str) -> Notification:
        """The notification as this reader reads it."""
        return Notification(
            id=self.id,
            topic=Topic(self.topic),
            title=self._words(locale, self.title),
            body=self._words(locale, self.body),
            data=self.data,
            created_at=self.created_at,
            read_at=self.read_at,
        )

    def _words(self, locale: str, text: str) -> str:
        return text if self.params is None else translate(locale, text, self.params)

    def frame(self, locale: str) -> bytes:
        """The same as a frame of the stream."""
        return b'{"type":"notification",' + self.translated(locale).model_dump_json().encode()[1:]


@dataclass(frozen=True, slots=True)
class Draft:
    """A notification that has no number yet. Wordless ones only move what a page shows."""

    user_id: UUID
    topic: Topic
    title: str
    body: str
    params: Mapping[str, object] | None
    data: Mapping[str, object]

    def numbered(self, id: int, created_at: datetime, read_at: datetime | None) -> Letter:
        """The letter that this has become."""
        return Letter(
            id, self.topic.value, self.title, self.body, self.params, dict(self.data), created_at, read_at
        )
