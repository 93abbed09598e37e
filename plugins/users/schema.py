"""The tables of accounts, in the order they came to be."""

from typing import Final

MIGRATIONS: Final = (
    """
    CREATE TABLE users (
        id            uuid PRIMARY KEY,
        email         text NOT NULL,
        email_folded  text NOT NULL UNIQUE,
        display_name  text NOT NULL DEFAULT '',
        password_hash text NOT NULL,
        role          text NOT NULL DEFAULT 'user' CHECK (role IN ('user', 'admin')),
        status        text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
        announced     boolean NOT NULL DEFAULT false,
        created_at    timestamptz NOT NULL DEFAULT now(),
        updated_at    timestamptz NOT NULL DEFAULT now()
    );
    CREATE INDEX users_administrators ON users (id) WHERE role = 'admin';
    CREATE TABLE sessions (
        id           uuid PRIMARY KEY,
        user_id      uuid NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        user_agent   text NOT NULL,
        address      text NOT NULL,
        created_at   timestamptz NOT NULL DEFAULT now(),
        last_used_at timestamptz,
        expires_at   timestamptz NOT NULL
    );
    CREATE INDEX sessions_of_user ON sessions (user_id);
    CREATE INDEX sessions_expiry ON sessions (expires_at);
    CREATE TABLE refresh_tokens (
        hash       bytea PRIMARY KEY,
        session_id uuid NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
        spent_at   timestamptz
    );
    CREATE INDEX refresh_tokens_of_session ON refresh_tokens (session_id);
    CREATE INDEX refresh_tokens_spent ON refresh_tokens (spent_at) WHERE spent_at IS NOT NULL;
    """,
    """
    CREATE TABLE audit (
        id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at       timestamptz NOT NULL DEFAULT now(),
        actor_id uuid,
        action   text NOT NULL,
        target   text NOT NULL,
        address  text NOT NULL,
        before   jsonb,
        after    jsonb
    );
    CREATE INDEX audit_of_target ON audit (target, id);
    CREATE INDEX audit_of_action ON audit (action, id);

    CREATE FUNCTION audit_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'audit entries are never changed or deleted' USING ERRCODE = 'check_violation';
    END $$;
    CREATE TRIGGER audit_is_final BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
        FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change();
    """,
)
