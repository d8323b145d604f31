-- How batches travel: one call of one function, so that fence, rows and commit are one round trip.
-- The types are what nodes of this version send. A later version that sends more gets types and a
-- function of its own, and these stay as long as nodes of this version may run.

CREATE TYPE pavane.run_1 AS (
    no bigint, service text, id text, target integer, workflow text, version integer, mode text,
    home text, status text, holder text, hop integer, header text, trail text, attributes text,
    wake_us bigint, reason text, deaths integer, started_us bigint, ended_us bigint, result text,
    undone integer, entries integer
);
CREATE TYPE pavane.journal_1 AS (run bigint, seq integer, body text);
CREATE TYPE pavane.message_1 AS (
    target integer, kind text, id text, receiver text, run text, at_us bigint, body text
);
CREATE TYPE pavane.inbox_1 AS (id text, service text, at_us bigint, passed_to text);
CREATE TYPE pavane.mail_1 AS (
    service text, run text, id text, type text, body text, at_us bigint
);
CREATE TYPE pavane.mail_key_1 AS (service text, run text, id text);
CREATE TYPE pavane.parked_1 AS (
    id text, service text, run text, target integer, call text, attempt integer, due_us bigint,
    began_us bigint, beat text, error text, deaths integer
);
CREATE TYPE pavane.named_1 AS (owner text, id text);
CREATE TYPE pavane.position_1 AS (target bigint, position bigint);
CREATE TYPE pavane.event_1 AS (
    slot integer, id text, type text, version integer, key text, source text, at_us bigint,
    conversation text, cause text, trace text, data text
);
CREATE TYPE pavane.mark_1 AS (
    handler integer, pos bigint, at_us bigint, took_us bigint, attempts integer, outcome text,
    variant text
);
CREATE TYPE pavane.parked_event_1 AS (
    handler integer, pos bigint, slot integer, key text, attempt integer, due_us bigint,
    began_us bigint, error text, deaths integer, again text, data text, dead bigint
);
CREATE TYPE pavane.handled_1 AS (handler integer, pos bigint);
CREATE TYPE pavane.dead_1 AS (
    handler integer, pos bigint, slot integer, key text, type text, event text, at_us bigint,
    attempts integer, cause text, error text, data text, holds boolean, asked text, again text
);
CREATE TYPE pavane.asked_1 AS (no bigint, asked text);
CREATE TYPE pavane.state_1 AS (service text, name text, key text, body text);
CREATE TYPE pavane.shadow_1 AS (
    handler integer, pos bigint, at_us bigint, events text, error text
);
CREATE TYPE pavane.await_1 AS (
    service text, type text, key text, run text, id text, at_us bigint, reply text, pos bigint
);
CREATE TYPE pavane.kept_1 AS (
    service text, type text, key text, pos bigint, expires_us bigint
);
CREATE TYPE pavane.cursor_1 AS (handler integer, slot integer, position bigint);
CREATE TYPE pavane.conversation_1 AS (
    contract text, id text, key text, started_us bigint, due_us bigint, ended_us bigint,
    first_end text, ends integer, last text, last_us bigint, milestones text, raised boolean
);

CREATE FUNCTION pavane.clock_us() RETURNS bigint LANGUAGE sql VOLATILE
RETURN (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;

-- What handlers made of events, as a part of a batch.
CREATE TYPE pavane.reaction_1 AS (
    marks pavane.mark_1[],
    remarks pavane.mark_1[],
    unparked pavane.handled_1[],
    parked pavane.parked_event_1[],
    undead bigint[],
    dead pavane.dead_1[],
    asked pavane.asked_1[],
    unstated pavane.state_1[],
    stated pavane.state_1[],
    shadows pavane.shadow_1[],
    unawaited pavane.named_1[],
    awaited pavane.await_1[],
    kept pavane.kept_1[],
    cursors pavane.cursor_1[],
    conversations pavane.conversation_1[],
    members pavane.named_1[]
);

-- A part of `write_1`. What takes rows away comes before what writes rows of the same kind.
CREATE FUNCTION pavane.react_1(r pavane.reaction_1) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    IF cardinality(r.marks) > 0 THEN
        INSERT INTO pavane.marks SELECT * FROM unnest(r.marks);
    END IF;
    IF cardinality(r.remarks) > 0 THEN
        INSERT INTO pavane.marks SELECT * FROM unnest(r.remarks)
        ON CONFLICT (handler, pos) DO UPDATE SET
            at_us = excluded.at_us, took_us = excluded.took_us, attempts = excluded.attempts,
            outcome = excluded.outcome, variant = excluded.variant;
    END IF;
    IF cardinality(r.unparked) > 0 THEN
        DELETE FROM pavane.parked_events AS p USING unnest(r.unparked) AS u
        WHERE p.handler = u.handler AND p.pos = u.pos;
    END IF;
    IF cardinality(r.parked) > 0 THEN
        INSERT INTO pavane.parked_events SELECT * FROM unnest(r.parked)
        ON CONFLICT (handler, pos) DO UPDATE SET
            slot = excluded.slot, key = excluded.key, attempt = excluded.attempt,
            due_us = excluded.due_us, began_us = excluded.began_us, error = excluded.error,
            deaths = excluded.deaths, again = excluded.again, data = excluded.data,
            dead = excluded.dead;
    END IF;
    IF cardinality(r.undead) > 0 THEN
        DELETE FROM pavane.dead_letters WHERE no = ANY (r.undead);
    END IF;
    IF cardinality(r.dead) > 0 THEN
        INSERT INTO pavane.dead_letters (
            handler, pos, slot, key, type, event, at_us, attempts, cause, error, data, holds,
            asked, again
        )
        SELECT * FROM unnest(r.dead);
    END IF;
    IF cardinality(r.asked) > 0 THEN
        UPDATE pavane.dead_letters AS d SET asked = a.asked FROM unnest(r.asked) AS a
        WHERE d.no = a.no;
    END IF;
    IF cardinality(r.unstated) > 0 THEN
        DELETE FROM pavane.states AS s USING unnest(r.unstated) AS u
        WHERE s.service = u.service AND s.name = u.name AND s.key = u.key;
    END IF;
    IF cardinality(r.stated) > 0 THEN
        INSERT INTO pavane.states SELECT * FROM unnest(r.stated)
        ON CONFLICT (service, name, key) DO UPDATE SET body = excluded.body;
    END IF;
    IF cardinality(r.shadows) > 0 THEN
        INSERT INTO pavane.shadows SELECT * FROM unnest(r.shadows)
        ON CONFLICT (handler, pos) DO UPDATE SET
            at_us = excluded.at_us, events = excluded.events, error = excluded.error;
    END IF;
    IF cardinality(r.unawaited) > 0 THEN
        DELETE FROM pavane.awaits AS a USING unnest(r.unawaited) AS u
        WHERE a.run = u.owner AND (a.id = u.id OR u.id = '*');
    END IF;
    IF cardinality(r.awaited) > 0 THEN
        INSERT INTO pavane.awaits SELECT * FROM unnest(r.awaited)
        ON CONFLICT (run, id) DO UPDATE SET
            service = excluded.service, type = excluded.type, key = excluded.key,
            at_us = excluded.at_us, reply = excluded.reply, pos = excluded.pos;
    END IF;
    IF cardinality(r.kept) > 0 THEN
        INSERT INTO pavane.kept_events SELECT * FROM unnest(r.kept)
        ON CONFLICT (service, type, key, pos) DO NOTHING;
    END IF;
    IF cardinality(r.cursors) > 0 THEN
        UPDATE pavane.cursors AS c SET position = m.position FROM unnest(r.cursors) AS m
        WHERE c.handler = m.handler AND c.slot = m.slot AND c.position < m.position;
    END IF;
    IF cardinality(r.conversations) > 0 THEN
        INSERT INTO pavane.conversations SELECT * FROM unnest(r.conversations)
        ON CONFLICT (id, contract) DO UPDATE SET
            key = excluded.key, started_us = excluded.started_us, due_us = excluded.due_us,
            ended_us = excluded.ended_us, first_end = excluded.first_end, ends = excluded.ends,
            last = excluded.last, last_us = excluded.last_us, milestones = excluded.milestones,
            raised = excluded.raised;
    END IF;
    IF cardinality(r.members) > 0 THEN
        INSERT INTO pavane.members SELECT * FROM unnest(r.members)
        ON CONFLICT (conversation, run) DO NOTHING;
    END IF;
END $$;

-- Append events under the head's lock, which the caller holds: `before` is where they begin. One
-- whose id is there leaves a gap. Returns the positions of those that are new.
CREATE FUNCTION pavane.append_events_1(before bigint, published pavane.event_1[])
RETURNS bigint[] LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    found bigint[];
BEGIN
    WITH fresh AS (
        INSERT INTO pavane.events (
            pos, slot, id, type, version, key, source, at_us, conversation, cause, trace, data
        )
        SELECT before + e.nth, e.slot, e.id, e.type, e.version, e.key, e.source, e.at_us,
            e.conversation, e.cause, e.trace, e.data
        FROM unnest(published) WITH ORDINALITY AS e (
            slot, id, type, version, key, source, at_us, conversation, cause, trace, data, nth
        )
        ORDER BY e.nth
        ON CONFLICT (id) DO NOTHING
        RETURNING pos, type, version
    ), counted AS (
        INSERT INTO pavane.event_types
        SELECT type, version, count(*) FROM fresh GROUP BY type, version ORDER BY type, version
        ON CONFLICT (type, version) DO UPDATE SET count = event_types.count + excluded.count
    )
    SELECT array_agg(pos) INTO found FROM fresh;
    RETURN coalesce(found, '{}');
END $$;

-- Write one batch. With `node`, only under its lease, which this prolongs, and once for each
-- number of a batch, which grow by one. The verdict is 'written', 'repeated' (an earlier call, whose
-- answer was lost, wrote it) or 'lost' (the lease, or batches before this one, by a database that was
-- put back under the node; nothing was written). The lock of the node's row is
-- the fence: it conflicts with the DELETE by which others take over. The head's lock comes last, since
-- everybody who appends waits for it. Rows must be folded: none twice for one key.
CREATE FUNCTION pavane.write_1(
    node bigint,
    proof text,
    lease_us bigint,
    batch_no bigint,
    new_runs pavane.run_1[],
    new_journal pavane.journal_1[],
    new_messages pavane.message_1[],
    new_inbox pavane.inbox_1[],
    mail_taken pavane.mail_key_1[],
    new_mail pavane.mail_1[],
    unparked pavane.named_1[],
    new_parked pavane.parked_1[],
    positions pavane.position_1[],
    published pavane.event_1[],
    reaction pavane.reaction_1,
    OUT verdict text,
    OUT log_before bigint,
    OUT events_before bigint,
    OUT new_events bigint[]
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    messages_count integer := cardinality(new_messages);
    events_count integer := cardinality(published);
    held record;
BEGIN
    IF node IS NOT NULL THEN
        UPDATE pavane.nodes AS n SET expires_us = pavane.clock_us() + lease_us, batch = batch_no
        WHERE n.no = node AND n.nonce = proof AND n.batch = batch_no - 1;
        IF NOT FOUND THEN
            SELECT n.log_before AS log, n.events_before AS events INTO held
            FROM pavane.nodes AS n WHERE n.no = node AND n.nonce = proof AND n.batch >= batch_no
            FOR NO KEY UPDATE;
            IF NOT FOUND THEN
                verdict := 'lost';
                RETURN;
            END IF;
            verdict := 'repeated';
            log_before := held.log;
            events_before := held.events;
            new_events := ARRAY(
                SELECT e.pos FROM pavane.events AS e
                WHERE e.pos > held.events AND e.pos <= held.events + events_count
            );
            RETURN;
        END IF;
    END IF;
    IF cardinality(new_runs) > 0 THEN
        INSERT INTO pavane.runs SELECT * FROM unnest(new_runs)
        ON CONFLICT (no) DO UPDATE SET
            mode = excluded.mode, status = excluded.status, holder = excluded.holder,
            hop = excluded.hop, header = excluded.header, trail = excluded.trail,
            attributes = excluded.attributes, wake_us = excluded.wake_us,
            reason = excluded.reason, deaths = excluded.deaths, ended_us = excluded.ended_us,
            result = excluded.result, undone = excluded.undone, entries = excluded.entries;
    END IF;
    IF cardinality(new_journal) > 0 THEN
        INSERT INTO pavane.journal SELECT * FROM unnest(new_journal);
    END IF;
    IF cardinality(new_inbox) > 0 THEN
        INSERT INTO pavane.inbox SELECT * FROM unnest(new_inbox);
    END IF;
    IF cardinality(mail_taken) > 0 THEN
        DELETE FROM pavane.mailbox AS m USING unnest(mail_taken) AS t
        WHERE m.service = t.service AND m.run = t.run AND (m.id = t.id OR t.id = '*');
    END IF;
    IF cardinality(new_mail) > 0 THEN
        INSERT INTO pavane.mailbox (service, run, id, type, body, at_us)
        SELECT * FROM unnest(new_mail)
        ON CONFLICT (run, service, id) DO NOTHING;
    END IF;
    IF cardinality(unparked) > 0 THEN
        DELETE FROM pavane.parked AS p USING unnest(unparked) AS u
        WHERE p.service = u.owner AND p.id = u.id;
    END IF;
    IF cardinality(new_parked) > 0 THEN
        INSERT INTO pavane.parked SELECT * FROM unnest(new_parked)
        ON CONFLICT (id, service) DO UPDATE SET
            attempt = excluded.attempt, due_us = excluded.due_us, beat = excluded.beat,
            error = excluded.error, deaths = excluded.deaths;
    END IF;
    IF cardinality(positions) > 0 THEN
        UPDATE pavane.partitions AS p SET position = m.position FROM unnest(positions) AS m
        WHERE p.target = m.target AND p.position < m.position;
    END IF;
    IF reaction IS NOT NULL THEN
        PERFORM pavane.react_1(reaction);
    END IF;
    IF messages_count > 0 OR events_count > 0 THEN
        UPDATE pavane.heads AS h
        SET log = h.log + messages_count, events = h.events + events_count
        RETURNING h.log - messages_count, h.events - events_count
        INTO log_before, events_before;
    END IF;
    IF messages_count > 0 THEN
        INSERT INTO pavane.log (pos, target, kind, id, receiver, run, at_us, origin, body)
        SELECT log_before + m.nth, m.target, m.kind, m.id, m.receiver, m.run, m.at_us, node, m.body
        FROM unnest(new_messages) WITH ORDINALITY AS m (
            target, kind, id, receiver, run, at_us, body, nth
        );
    END IF;
    IF events_count > 0 THEN
        new_events := pavane.append_events_1(events_before, published);
    END IF;
    IF node IS NOT NULL AND (messages_count > 0 OR events_count > 0) THEN
        UPDATE pavane.nodes AS n
        SET log_before = write_1.log_before, events_before = write_1.events_before
        WHERE n.no = node;
    END IF;
    verdict := 'written';
END $$;

-- Move what transactions of users' published into the log, in the order in which it was written. One
-- mover at a time, by the head's lock: two could put later events before earlier ones.
CREATE FUNCTION pavane.relay_1() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    before bigint;
    staged pavane.event_1[];
BEGIN
    SELECT h.events INTO before FROM pavane.heads AS h FOR NO KEY UPDATE;
    WITH moved AS (
        DELETE FROM pavane.outbox
        WHERE no IN (SELECT no FROM pavane.outbox ORDER BY no LIMIT 1000) RETURNING *
    )
    SELECT array_agg(
        (slot, id, type, version, key, source, at_us, conversation, cause, trace,
            data)::pavane.event_1
        ORDER BY no
    ) INTO staged FROM moved;
    IF staged IS NOT NULL THEN
        UPDATE pavane.heads SET events = events + cardinality(staged);
        PERFORM pavane.append_events_1(before, staged);
    END IF;
END $$;

-- Publish inside a transaction of a user's: with it or not at all. Those who listen are told at its
-- commit; here a NOTIFY is in the transaction, since nobody of Pavane's knows when that is.
CREATE FUNCTION pavane.publish_1(
    slot integer, id text, type text, version integer, key text, source text, at_us bigint,
    conversation text, cause text, trace text, data text
) RETURNS text LANGUAGE sql VOLATILE AS $$
    INSERT INTO pavane.outbox (
        slot, id, type, version, key, source, at_us, conversation, cause, trace, data
    ) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11);
    SELECT pg_notify('pavane', 'outbox');
    SELECT $2;
$$;
