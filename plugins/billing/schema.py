"""Billing's tables.

An entry moves `amount` onto its account: what a user can spend, what was earned, and so on are
positive, the money that lies with payment providers (`clearing`) and what promotions gave away are
negative, and all entries of a transaction sum up to zero. Only users' accounts keep a running
balance: one row that every payment and every charge had to lock would let them wait for each other
and deadlock. The others' balances are sums.
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
)
