"""Apps' tables. Append only: a database that has seen a step refuses an edited one."""

from typing import Final

MIGRATIONS: Final = (
    """
    CREATE TABLE apps (
        id           uuid PRIMARY KEY,
        owner_id     uuid NOT NULL REFERENCES users (id),
        state        text NOT NULL CHECK (state IN ('uploading', 'ready', 'deleting')),
        package      text NOT NULL DEFAULT '',
        label        text NOT NULL DEFAULT '',
        version_name text,
        version_code bigint,
        min_sdk      integer,
        target_sdk   integer,
        permissions  text[] NOT NULL DEFAULT '{}',
        has_icon     boolean NOT NULL DEFAULT false,
        size_bytes   bigint NOT NULL DEFAULT 0,
        sha256       text NOT NULL DEFAULT '',
        created_at   timestamptz NOT NULL DEFAULT now()
    );
    CREATE UNIQUE INDEX apps_same_bytes ON apps (owner_id, sha256) WHERE state = 'ready';
    CREATE INDEX apps_newest ON apps (owner_id, created_at DESC, id);
    CREATE TABLE installations (
        id         uuid PRIMARY KEY,
        device_id  uuid NOT NULL,
        owner_id   uuid NOT NULL REFERENCES users (id),
        app_id     uuid NOT NULL REFERENCES apps (id) ON DELETE CASCADE,
        package    text NOT NULL,
        state      text NOT NULL CHECK (state IN ('queued', 'installing', 'installed', 'failed')),
        detail     text NOT NULL DEFAULT '',
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE INDEX installations_of_device ON installations (device_id, created_at DESC);
    CREATE INDEX installations_of_app ON installations (app_id);
    CREATE INDEX installations_open ON installations (created_at) WHERE state IN ('queued', 'installing');
    CREATE UNIQUE INDEX installations_one_at_a_time ON installations (device_id) WHERE state = 'installing';
    """,
)
