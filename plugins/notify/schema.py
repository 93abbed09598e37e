"""The tables of notifications, in the order they came to be."""

from typing import Final

MIGRATIONS: Final = (
    """
    CREATE TABLE notification_counters (
        user_id  uuid PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,
        last_id  bigint NOT NULL,
        unread   bigint NOT NULL,
        revision bigint NOT NULL
    ) WITH (fillfactor = 70);
    CREATE TABLE notifications (
        user_id    uuid NOT NULL REFERENCES notification_counters (user_id) ON DELETE CASCADE,
        id         bigint NOT NULL,
        topic      text NOT NULL,
        title      text NOT NULL,
        body       text NOT NULL,
        params     jsonb,
        data       jsonb NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        read_at    timestamptz,
        PRIMARY KEY (user_id, id)
    );
    CREATE INDEX notifications_unread ON notifications (user_id, id) WHERE read_at IS NULL;
    CREATE INDEX notifications_by_age ON notifications (created_at);
    """,
)
