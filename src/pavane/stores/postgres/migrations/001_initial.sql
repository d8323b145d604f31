-- The first schema. Text that is compared or ordered has collation C, which is the order of its bytes
-- in every locale. Small rows that change all the time have room to be updated in place (HOT).

CREATE TABLE pavane.meta (key text PRIMARY KEY, value text NOT NULL);

CREATE TABLE pavane.services (
    no integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE "C" NOT NULL UNIQUE
);

-- The ends of both logs, in one row. Whoever appends locks it until its commit, so that the order of
-- positions is the order of commits and nobody ever sees a position below one that was seen before.
CREATE TABLE pavane.heads (log bigint NOT NULL, events bigint NOT NULL) WITH (fillfactor = 20);
INSERT INTO pavane.heads VALUES (0, 0);

-- `batch` numbers what a node wrote; the two columns after it tell where its newest batch began in
-- the logs. So a batch whose answer was lost can be looked up, and can take effect once only.
CREATE TABLE pavane.nodes (
    no bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    nonce text NOT NULL,
    name text NOT NULL,
    host text NOT NULL,
    pid bigint NOT NULL,
    services text[] NOT NULL,
    expires_us bigint NOT NULL,
    joined_us bigint NOT NULL,
    asked text NOT NULL DEFAULT '',
    batch bigint NOT NULL DEFAULT 0,
    log_before bigint NOT NULL DEFAULT 0,
    events_before bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 20);

CREATE TABLE pavane.partitions (
    target integer PRIMARY KEY,
    service text COLLATE "C" NOT NULL,
    partition integer NOT NULL,
    owner bigint,
    clean boolean NOT NULL DEFAULT true,
    position bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
CREATE INDEX partitions_by_service ON pavane.partitions (service);

CREATE TABLE pavane.runs (
    no bigint PRIMARY KEY,
    service text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    target integer NOT NULL,
    workflow text COLLATE "C" NOT NULL,
    version integer NOT NULL,
    mode text NOT NULL,
    home text COLLATE "C" NOT NULL,
    status text NOT NULL,
    holder text NOT NULL,
    hop integer NOT NULL,
    header text NOT NULL,
    trail text NOT NULL,
    attributes text NOT NULL,
    wake_us bigint,
    reason text NOT NULL,
    deaths integer NOT NULL,
    started_us bigint NOT NULL,
    ended_us bigint,
    result text,
    undone integer NOT NULL,
    entries integer NOT NULL
) WITH (fillfactor = 80);
CREATE UNIQUE INDEX runs_by_id ON pavane.runs (id, service);
CREATE INDEX runs_live ON pavane.runs (target, no) WHERE status IN ('running', 'stuck');
CREATE INDEX runs_due ON pavane.runs (wake_us, no) WHERE wake_us IS NOT NULL;
CREATE INDEX runs_ended ON pavane.runs (ended_us) WHERE ended_us IS NOT NULL;

CREATE TABLE pavane.journal (
    run bigint NOT NULL,
    seq integer NOT NULL,
    body text NOT NULL,
    PRIMARY KEY (run, seq)
);

CREATE TABLE pavane.log (
    pos bigint PRIMARY KEY,
    target integer NOT NULL,
    kind text NOT NULL,
    id text COLLATE "C" NOT NULL,
    receiver text COLLATE "C" NOT NULL,
    run text COLLATE "C" NOT NULL,
    at_us bigint NOT NULL,
    origin bigint,
    body text NOT NULL
);
CREATE INDEX log_by_id ON pavane.log USING hash (id);

CREATE TABLE pavane.inbox (
    id text COLLATE "C" NOT NULL,
    service text COLLATE "C" NOT NULL,
    at_us bigint NOT NULL,
    passed_to text NOT NULL,
    PRIMARY KEY (id, service)
);

CREATE TABLE pavane.mailbox (
    no bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    service text COLLATE "C" NOT NULL,
    run text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    type text NOT NULL,
    body text NOT NULL,
    at_us bigint NOT NULL
);
CREATE UNIQUE INDEX mailbox_by_run ON pavane.mailbox (run, service, id);

CREATE TABLE pavane.parked (
    id text COLLATE "C" NOT NULL,
    service text COLLATE "C" NOT NULL,
    run text COLLATE "C" NOT NULL,
    target integer NOT NULL,
    call text NOT NULL,
    attempt integer NOT NULL,
    due_us bigint NOT NULL,
    began_us bigint NOT NULL,
    beat text NOT NULL,
    error text NOT NULL,
    deaths integer NOT NULL,
    PRIMARY KEY (id, service)
);
CREATE INDEX parked_due ON pavane.parked (due_us, id);
CREATE INDEX parked_by_run ON pavane.parked (run, service);

-- Published events, and what handlers make of them. An event's id is unique, whoever publishes it.
CREATE TABLE pavane.events (
    pos bigint PRIMARY KEY,
    slot integer NOT NULL,
    id text COLLATE "C" NOT NULL,
    type text COLLATE "C" NOT NULL,
    version integer NOT NULL,
    key text COLLATE "C" NOT NULL,
    source text COLLATE "C" NOT NULL,
    at_us bigint NOT NULL,
    conversation text COLLATE "C" NOT NULL,
    cause text COLLATE "C" NOT NULL,
    trace text NOT NULL,
    data text NOT NULL
);
CREATE UNIQUE INDEX events_by_id ON pavane.events (id);
-- Without the events that began one: they are found by their id, and are what is published most.
CREATE INDEX events_by_conversation ON pavane.events (conversation) WHERE conversation <> id;

-- How many there are, kept with them: counting would read the whole log.
CREATE TABLE pavane.event_types (
    type text COLLATE "C" NOT NULL,
    version integer NOT NULL,
    count bigint NOT NULL,
    PRIMARY KEY (type, version)
) WITH (fillfactor = 20);

-- Events that were published inside transactions of users': they wait here, in the order in which
-- they were written, for whoever reads the log next to append them.
CREATE TABLE pavane.outbox (
    no bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    slot integer NOT NULL,
    id text COLLATE "C" NOT NULL,
    type text COLLATE "C" NOT NULL,
    version integer NOT NULL,
    key text COLLATE "C" NOT NULL,
    source text COLLATE "C" NOT NULL,
    at_us bigint NOT NULL,
    conversation text COLLATE "C" NOT NULL,
    cause text COLLATE "C" NOT NULL,
    trace text NOT NULL,
    data text NOT NULL
);

CREATE TABLE pavane.handlers (
    no integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    service text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    types text[] COLLATE "C" NOT NULL,
    created_us bigint NOT NULL,
    paused_until_us bigint NOT NULL DEFAULT 0,
    reason text NOT NULL DEFAULT '',
    UNIQUE (service, name)
);

CREATE TABLE pavane.cursors (
    handler integer NOT NULL,
    slot integer NOT NULL,
    position bigint NOT NULL,
    PRIMARY KEY (handler, slot)
) WITH (fillfactor = 50);

CREATE TABLE pavane.marks (
    handler integer NOT NULL,
    pos bigint NOT NULL,
    at_us bigint NOT NULL,
    took_us bigint NOT NULL,
    attempts integer NOT NULL,
    outcome text NOT NULL,
    variant text NOT NULL,
    PRIMARY KEY (handler, pos)
);

CREATE TABLE pavane.parked_events (
    handler integer NOT NULL,
    pos bigint NOT NULL,
    slot integer NOT NULL,
    key text COLLATE "C" NOT NULL,
    attempt integer NOT NULL,
    due_us bigint NOT NULL,
    began_us bigint NOT NULL,
    error text NOT NULL,
    deaths integer NOT NULL,
    again text NOT NULL,
    data text,
    dead bigint NOT NULL,
    PRIMARY KEY (handler, pos)
);
CREATE INDEX parked_events_by_key ON pavane.parked_events (handler, key, pos);
CREATE INDEX parked_events_by_pos ON pavane.parked_events (pos);

CREATE TABLE pavane.dead_letters (
    no bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    handler integer NOT NULL,
    pos bigint NOT NULL,
    slot integer NOT NULL,
    key text COLLATE "C" NOT NULL,
    type text COLLATE "C" NOT NULL,
    event text NOT NULL,
    at_us bigint NOT NULL,
    attempts integer NOT NULL,
    cause text COLLATE "C" NOT NULL,
    error text NOT NULL,
    data text NOT NULL,
    holds boolean NOT NULL,
    asked text NOT NULL,
    again text NOT NULL
);
-- Dead letters are few and written seldom, so each way of asking for them has its index.
CREATE INDEX dead_letters_by_handler ON pavane.dead_letters (handler, no);
CREATE INDEX dead_letters_by_key ON pavane.dead_letters (key);
CREATE INDEX dead_letters_holding ON pavane.dead_letters (handler) WHERE holds;
CREATE INDEX dead_letters_by_pos ON pavane.dead_letters (pos);

CREATE TABLE pavane.states (
    service text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    body text NOT NULL,
    PRIMARY KEY (service, name, key)
);

CREATE TABLE pavane.shadows (
    handler integer NOT NULL,
    pos bigint NOT NULL,
    at_us bigint NOT NULL,
    events text NOT NULL,
    error text NOT NULL,
    PRIMARY KEY (handler, pos)
);

CREATE TABLE pavane.awaits (
    service text COLLATE "C" NOT NULL,
    type text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    run text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    at_us bigint NOT NULL,
    reply text NOT NULL,
    pos bigint NOT NULL,
    PRIMARY KEY (run, id)
);
CREATE INDEX awaits_by_key ON pavane.awaits (service, type, key);
CREATE INDEX awaits_given ON pavane.awaits (at_us) WHERE pos > 0;

CREATE TABLE pavane.kept_events (
    service text COLLATE "C" NOT NULL,
    type text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    pos bigint NOT NULL,
    expires_us bigint NOT NULL,
    PRIMARY KEY (service, type, key, pos)
);
CREATE INDEX kept_events_by_pos ON pavane.kept_events (pos);
CREATE INDEX kept_events_by_expiry ON pavane.kept_events (expires_us);

CREATE TABLE pavane.conversations (
    contract text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    started_us bigint NOT NULL,
    due_us bigint NOT NULL,
    ended_us bigint,
    first_end text NOT NULL,
    ends integer NOT NULL,
    last text NOT NULL,
    last_us bigint NOT NULL,
    milestones text NOT NULL,
    raised boolean NOT NULL,
    PRIMARY KEY (id, contract)
);
CREATE INDEX conversations_due ON pavane.conversations (due_us) WHERE ended_us IS NULL;
CREATE INDEX conversations_unraised ON pavane.conversations (due_us)
    WHERE ended_us IS NULL AND NOT raised;
CREATE INDEX conversations_started ON pavane.conversations (started_us);
CREATE INDEX conversations_ended ON pavane.conversations (ended_us) WHERE ended_us IS NOT NULL;
CREATE INDEX conversations_twice ON pavane.conversations (started_us) WHERE ends > 1;

-- Runs that a handler started, by the conversation they belong to; children are found by their ids.
CREATE TABLE pavane.members (
    conversation text COLLATE "C" NOT NULL,
    run text COLLATE "C" NOT NULL,
    PRIMARY KEY (conversation, run)
);
CREATE INDEX members_by_run ON pavane.members (run);
