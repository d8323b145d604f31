-- Published events, and what handlers make of them. An event's id is unique, whoever publishes it;
-- marks are appended per handler, so that the hot index grows at one place each.

CREATE TABLE events (
    pos INTEGER PRIMARY KEY AUTOINCREMENT,
    slot INTEGER NOT NULL,
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    version INTEGER NOT NULL,
    key TEXT NOT NULL,
    source TEXT NOT NULL,
    at_us INTEGER NOT NULL,
    conversation TEXT NOT NULL,
    cause TEXT NOT NULL,
    trace TEXT NOT NULL,
    data TEXT NOT NULL
);
CREATE UNIQUE INDEX events_by_id ON events (id);
-- Without the events that began one: they are found by their id, and are what is published most.
CREATE INDEX events_by_conversation ON events (conversation) WHERE conversation <> id;

-- How many there are, kept with them: counting would read the whole log.
CREATE TABLE event_types (
    type TEXT NOT NULL,
    version INTEGER NOT NULL,
    count INTEGER NOT NULL,
    PRIMARY KEY (type, version)
) WITHOUT ROWID;

CREATE TABLE handlers (
    no INTEGER PRIMARY KEY AUTOINCREMENT,
    service TEXT NOT NULL,
    name TEXT NOT NULL,
    types TEXT NOT NULL,
    created_us INTEGER NOT NULL,
    paused_until_us INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    UNIQUE (service, name)
);

CREATE TABLE cursors (
    handler INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (handler, slot)
) WITHOUT ROWID;

CREATE TABLE marks (
    handler INTEGER NOT NULL,
    pos INTEGER NOT NULL,
    at_us INTEGER NOT NULL,
    took_us INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    variant TEXT NOT NULL,
    PRIMARY KEY (handler, pos)
) WITHOUT ROWID;

CREATE TABLE parked_events (
    handler INTEGER NOT NULL,
    pos INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    key TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    due_us INTEGER NOT NULL,
    began_us INTEGER NOT NULL,
    error TEXT NOT NULL,
    deaths INTEGER NOT NULL,
    again TEXT NOT NULL,
    data TEXT,
    dead INTEGER NOT NULL,
    PRIMARY KEY (handler, pos)
) WITHOUT ROWID;
CREATE INDEX parked_events_by_key ON parked_events (handler, key, pos);
CREATE INDEX parked_events_by_pos ON parked_events (pos);

CREATE TABLE dead_letters (
    no INTEGER PRIMARY KEY AUTOINCREMENT,
    handler INTEGER NOT NULL,
    pos INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    key TEXT NOT NULL,
    type TEXT NOT NULL,
    event TEXT NOT NULL,
    at_us INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    cause TEXT NOT NULL,
    error TEXT NOT NULL,
    data TEXT NOT NULL,
    holds INTEGER NOT NULL,
    asked TEXT NOT NULL,
    again TEXT NOT NULL
);
-- Dead letters are few and written seldom, so each way of asking for them has its index.
CREATE INDEX dead_letters_by_handler ON dead_letters (handler);
CREATE INDEX dead_letters_by_key ON dead_letters (key);
CREATE INDEX dead_letters_holding ON dead_letters (handler) WHERE holds = 1;
CREATE INDEX dead_letters_by_pos ON dead_letters (pos);

CREATE TABLE states (
    service TEXT NOT NULL,
    name TEXT NOT NULL,
    key TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (service, name, key)
) WITHOUT ROWID;

CREATE TABLE shadows (
    handler INTEGER NOT NULL,
    pos INTEGER NOT NULL,
    at_us INTEGER NOT NULL,
    events TEXT NOT NULL,
    error TEXT NOT NULL,
    PRIMARY KEY (handler, pos)
) WITHOUT ROWID;

CREATE TABLE awaits (
    service TEXT NOT NULL,
    type TEXT NOT NULL,
    key TEXT NOT NULL,
    run TEXT NOT NULL,
    id TEXT NOT NULL,
    at_us INTEGER NOT NULL,
    reply TEXT NOT NULL,
    pos INTEGER NOT NULL,
    PRIMARY KEY (run, id)
) WITHOUT ROWID;
CREATE INDEX awaits_by_key ON awaits (service, type, key);
CREATE INDEX awaits_given ON awaits (at_us) WHERE pos > 0;

CREATE TABLE kept_events (
    service TEXT NOT NULL,
    type TEXT NOT NULL,
    key TEXT NOT NULL,
    pos INTEGER NOT NULL,
    expires_us INTEGER NOT NULL,
    PRIMARY KEY (service, type, key, pos)
) WITHOUT ROWID;
CREATE INDEX kept_events_by_pos ON kept_events (pos);
CREATE INDEX kept_events_by_expiry ON kept_events (expires_us);

CREATE TABLE conversations (
    contract TEXT NOT NULL,
    id TEXT NOT NULL,
    key TEXT NOT NULL,
    started_us INTEGER NOT NULL,
    due_us INTEGER NOT NULL,
    ended_us INTEGER,
    first_end TEXT NOT NULL,
    ends INTEGER NOT NULL,
    last TEXT NOT NULL,
    last_us INTEGER NOT NULL,
    milestones TEXT NOT NULL,
    raised INTEGER NOT NULL,
    PRIMARY KEY (id, contract)
) WITHOUT ROWID;
CREATE INDEX conversations_due ON conversations (due_us) WHERE ended_us IS NULL;
CREATE INDEX conversations_unraised ON conversations (due_us)
    WHERE ended_us IS NULL AND raised = 0;
CREATE INDEX conversations_started ON conversations (started_us);
CREATE INDEX conversations_ended ON conversations (ended_us) WHERE ended_us IS NOT NULL;
CREATE INDEX conversations_twice ON conversations (started_us) WHERE ends > 1;

-- Runs that a handler started, by the conversation they belong to; children are found by their ids.
CREATE TABLE members (
    conversation TEXT NOT NULL,
    run TEXT NOT NULL,
    PRIMARY KEY (conversation, run)
) WITHOUT ROWID;
CREATE INDEX members_by_run ON members (run);
