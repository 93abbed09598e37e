"""Billing's tables.

An entry moves `amount` onto its account: what a user can spend, what was earned, and so on are
positive, the money that lies with payment providers (`clearing`) and what promotions gave away are
negative, and all entries of a transaction sum up to zero. Every account keeps its running balance,
and every entry what the balance was after it. A transaction posts once, and locks users' accounts
before the house's: so those who share a row wait for each other's commit, and never in a circle.
"""

from typing import Final

MIGRATIONS: Final = (
    """
    CREATE TABLE ledger_accounts (
        id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        kind     text NOT NULL CHECK (kind IN ('user', 'revenue', 'clearing', 'promotions', 'unapplied')),
        user_id  uuid UNIQUE REFERENCES users (id),
        currency text NOT NULL,
        balance  bigint CONSTRAINT ledger_accounts_never_below_zero CHECK (balance >= 0),
        CHECK ((kind = 'user') = (user_id IS NOT NULL)),
        CHECK ((kind = 'user') = (balance IS NOT NULL))
    );
    CREATE UNIQUE INDEX ledger_accounts_one_of_a_kind ON ledger_accounts (kind) WHERE kind <> 'user';

    CREATE TABLE ledger_entries (
        transaction_id uuid NOT NULL,
        account_id     bigint NOT NULL REFERENCES ledger_accounts (id),
        position       bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
        amount         bigint NOT NULL CHECK (amount <> 0),
        balance_after  bigint CHECK (balance_after >= 0),
        kind           text NOT NULL,
        reference      text NOT NULL,
        created_at     timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (transaction_id, account_id)
    );
    CREATE INDEX ledger_entries_of_account ON ledger_entries (account_id, position);
    CREATE UNIQUE INDEX ledger_entries_one_credit_an_order ON ledger_entries (reference)
        WHERE kind = 'top_up' AND amount > 0;
    CREATE UNIQUE INDEX ledger_entries_one_unapplied_an_order ON ledger_entries (reference)
        WHERE kind = 'unapplied_payment' AND amount > 0;
    CREATE UNIQUE INDEX ledger_entries_one_welcome ON ledger_entries (reference)
        WHERE kind = 'welcome_credit' AND amount > 0;

    CREATE FUNCTION ledger_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'ledger entries are never changed or deleted' USING ERRCODE = 'check_violation';
    END $$;
    CREATE TRIGGER ledger_entries_are_final BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_entries
        FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuse_change();

    CREATE FUNCTION ledger_refuse_imbalance() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF EXISTS (SELECT FROM written GROUP BY transaction_id HAVING sum(amount) <> 0) THEN
            RAISE EXCEPTION 'the entries of a transaction do not sum up to zero'
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER ledger_entries_sum_up AFTER INSERT ON ledger_entries REFERENCING NEW TABLE AS written
        FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuse_imbalance();

    CREATE TABLE orders (
        id         uuid PRIMARY KEY,
        number     text NOT NULL UNIQUE,
        user_id    uuid NOT NULL REFERENCES users (id),
        provider   text NOT NULL,
        amount     bigint NOT NULL CHECK (amount > 0),
        currency   text NOT NULL,
        state      text NOT NULL DEFAULT 'pending'
                   CHECK (state IN ('pending', 'paid', 'cancelled', 'expired')),
        position   bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
        created_at timestamptz NOT NULL DEFAULT now(),
        expires_at timestamptz NOT NULL,
        paid_at    timestamptz,
        CHECK ((state = 'paid') = (paid_at IS NOT NULL))
    );
    CREATE INDEX orders_of_user ON orders (user_id, position);
    CREATE INDEX orders_to_expire ON orders (expires_at) WHERE state = 'pending';

    CREATE TABLE payment_events (
        provider     text NOT NULL,
        event_id     text NOT NULL,
        order_number text NOT NULL,
        amount       bigint NOT NULL,
        currency     text NOT NULL,
        status       text NOT NULL,
        body         bytea NOT NULL,
        deliveries   integer NOT NULL,
        received_at  timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (provider, event_id)
    );
    CREATE INDEX payment_events_of_order ON payment_events (order_number);
    """,
    """
    ALTER TABLE ledger_accounts DROP CONSTRAINT ledger_accounts_check1,
        DROP CONSTRAINT ledger_accounts_never_below_zero;
    UPDATE ledger_accounts a SET balance =
        coalesce((SELECT sum(e.amount) FROM ledger_entries e WHERE e.account_id = a.id), 0);
    ALTER TABLE ledger_accounts ALTER balance SET DEFAULT 0, ALTER balance SET NOT NULL,
        ADD CONSTRAINT ledger_accounts_never_below_zero
            CHECK (balance >= 0 OR kind NOT IN ('user', 'unapplied'));

    ALTER TABLE ledger_entries DROP CONSTRAINT ledger_entries_balance_after_check,
        DISABLE TRIGGER ledger_entries_are_final;
    UPDATE ledger_entries e SET balance_after = s.after FROM (
        SELECT transaction_id, account_id,
            sum(amount) OVER (PARTITION BY account_id ORDER BY position) AS after
        FROM ledger_entries
    ) s WHERE e.balance_after IS NULL AND (s.transaction_id, s.account_id) = (e.transaction_id, e.account_id);
    ALTER TABLE ledger_entries ENABLE TRIGGER ledger_entries_are_final;
    ALTER TABLE ledger_entries ALTER balance_after SET NOT NULL,
        ADD COLUMN label text NOT NULL DEFAULT '';
    CREATE INDEX ledger_entries_by_time ON ledger_entries (account_id, created_at);
    CREATE UNIQUE INDEX ledger_entries_one_correction ON ledger_entries (reference)
        WHERE kind = 'correction' AND amount > 0;

    ALTER TABLE orders ADD COLUMN provider_reference text NOT NULL DEFAULT '',
        ADD COLUMN asked integer NOT NULL DEFAULT 0,
        ADD COLUMN next_ask_at timestamptz;
    CREATE INDEX orders_to_ask ON orders (next_ask_at) WHERE next_ask_at IS NOT NULL;

    CREATE TABLE payments (
        id          uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        order_id    uuid NOT NULL REFERENCES orders (id),
        payment_id  text NOT NULL,
        amount      bigint NOT NULL CHECK (amount > 0),
        state       text NOT NULL CHECK (state IN ('credited', 'unapplied', 'returned')),
        reason      text NOT NULL DEFAULT '' CHECK (reason IN ('', 'order_closed', 'paid_twice')),
        refunded    bigint NOT NULL DEFAULT 0
                    CONSTRAINT payments_never_refunded_beyond CHECK (refunded BETWEEN 0 AND amount),
        position    bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
        received_at timestamptz NOT NULL DEFAULT now(),
        UNIQUE (order_id, payment_id)
    );
    CREATE INDEX payments_unapplied ON payments (position) WHERE state = 'unapplied';
    INSERT INTO payments (order_id, payment_id, amount, state, received_at)
        SELECT id, '', amount, 'credited', paid_at FROM orders WHERE state = 'paid' ORDER BY paid_at;
    INSERT INTO payments (order_id, payment_id, amount, state, reason, received_at)
        SELECT o.id, '', e.amount, 'unapplied', 'order_closed', e.created_at
        FROM ledger_entries e JOIN orders o ON o.number = e.reference
        WHERE e.kind = 'unapplied_payment' AND e.amount > 0 ORDER BY e.position;
    DROP INDEX ledger_entries_one_unapplied_an_order;

    CREATE TABLE refunds (
        id           uuid PRIMARY KEY,
        payment      uuid NOT NULL REFERENCES payments (id),
        amount       bigint NOT NULL CHECK (amount > 0),
        reason       text NOT NULL,
        state        text NOT NULL DEFAULT 'requested' CHECK (state IN ('requested', 'done', 'refused')),
        detail       text NOT NULL DEFAULT '',
        position     bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
        requested_by uuid NOT NULL,
        requested_at timestamptz NOT NULL DEFAULT now(),
        next_try_at  timestamptz DEFAULT now(),
        tries        integer NOT NULL DEFAULT 0,
        settled_at   timestamptz,
        CHECK ((state = 'requested') = (settled_at IS NULL)),
        CHECK ((state = 'requested') = (next_try_at IS NOT NULL))
    );
    CREATE INDEX refunds_of_payment ON refunds (payment);
    CREATE INDEX refunds_to_try ON refunds (next_try_at) WHERE state = 'requested';

    ALTER TABLE payment_events ADD COLUMN id uuid NOT NULL DEFAULT gen_random_uuid() UNIQUE,
        ADD COLUMN payment_id text NOT NULL DEFAULT '',
        ADD COLUMN misfit text NOT NULL DEFAULT ''
            CHECK (misfit IN ('', 'unknown_order', 'amount_mismatch', 'unreadable')),
        ADD COLUMN reviewed_at timestamptz;
    CREATE INDEX payment_events_misfits ON payment_events (received_at)
        WHERE misfit <> '' AND reviewed_at IS NULL;

    CREATE TABLE sandbox_payments (
        order_number text PRIMARY KEY,
        event_id     text NOT NULL,
        occurred_at  timestamptz NOT NULL DEFAULT now()
    );

    CREATE TABLE ledger_checks (
        id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at       timestamptz NOT NULL DEFAULT now(),
        findings jsonb NOT NULL
    );
    """,
)
