"""The plugin's tables."""

from typing import Final

MIGRATIONS: Final = (
    """
    CREATE TABLE devices (
        id               uuid PRIMARY KEY,
        owner_id         uuid NOT NULL REFERENCES users (id),
        name             text NOT NULL,
        image            text NOT NULL,
        plan             text NOT NULL,
        price_per_hour   bigint NOT NULL CHECK (price_per_hour >= 0),
        hardware         jsonb NOT NULL,
        state            text NOT NULL CHECK (state IN ('creating', 'starting', 'running', 'stopping',
                             'stopped', 'resetting', 'deleting', 'failed')),
        detail           text NOT NULL DEFAULT '',
        detail_params    jsonb NOT NULL DEFAULT '{}',
        wanted_state     text NOT NULL CHECK (wanted_state IN ('running', 'stopped', 'deleted')),
        generation       bigint NOT NULL DEFAULT 1,
        created_at       timestamptz NOT NULL DEFAULT now(),
        updated_at       timestamptz NOT NULL DEFAULT now(),
        started_at       timestamptz,
        metered_until    timestamptz,
        charge_remainder bigint NOT NULL DEFAULT 0 CHECK (charge_remainder BETWEEN 0 AND 3599),
        warned           boolean NOT NULL DEFAULT false,
        spent_at         timestamptz,
        revived_at       timestamptz,
        CHECK ((state = 'running') = (metered_until IS NOT NULL))
    );
    CREATE INDEX devices_of_owner ON devices (owner_id);
    CREATE INDEX devices_metered ON devices (metered_until) WHERE state = 'running' AND price_per_hour > 0;
    CREATE INDEX devices_spent ON devices (spent_at) WHERE spent_at IS NOT NULL;
    CREATE TABLE device_ports (
        node      text NOT NULL,
        port      integer NOT NULL CHECK (port BETWEEN 1 AND 65535),
        role      text NOT NULL CHECK (role IN ('adb', 'webrtc', 'scrcpy')),
        device_id uuid NOT NULL REFERENCES devices (id),
        PRIMARY KEY (node, port),
        UNIQUE (device_id, role)
    );
    """,
    """
    ALTER TABLE devices ADD COLUMN node text NOT NULL DEFAULT 'local', ADD COLUMN run text;
    CREATE TABLE device_installation (
        id      uuid NOT NULL DEFAULT gen_random_uuid(),
        runtime text CHECK (runtime IN ('docker', 'simulated')),
        is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only)
    );
    INSERT INTO device_installation DEFAULT VALUES;
    """,
    """
    CREATE TABLE device_meters (
        device_id      uuid PRIMARY KEY REFERENCES devices (id) ON DELETE CASCADE,
        owner_id       uuid NOT NULL,
        price_per_hour bigint NOT NULL CHECK (price_per_hour >= 0),
        metered_until  timestamptz,
        steady_s       double precision CHECK (steady_s IS NULL OR metered_until IS NOT NULL),
        remainder      bigint NOT NULL DEFAULT 0 CHECK (remainder BETWEEN 0 AND 3599)
    );
    INSERT INTO device_meters (device_id, owner_id, price_per_hour, metered_until, remainder)
        SELECT id, owner_id, price_per_hour, metered_until, charge_remainder FROM devices
        WHERE metered_until IS NOT NULL OR charge_remainder > 0;
    CREATE TABLE balance_warnings (
        owner_id uuid NOT NULL REFERENCES users (id),
        minutes  integer NOT NULL,
        PRIMARY KEY (owner_id, minutes)
    );
    INSERT INTO balance_warnings (owner_id, minutes)
        SELECT DISTINCT owner_id, minutes FROM devices, unnest(ARRAY[10, 60]) AS minutes
        WHERE state = 'running' AND warned;
    UPDATE devices SET warned = false WHERE spent_at IS NULL;
    ALTER TABLE devices DROP COLUMN metered_until, DROP COLUMN charge_remainder;
    ALTER TABLE devices RENAME COLUMN warned TO deletion_warned;
    """,
)
