-- The first schema. Keys of hot tables are integers that grow, so that rows are appended: a random
-- text key makes the journal seven times slower.

CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE services (no INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);

CREATE TABLE nodes (
    no INTEGER PRIMARY KEY AUTOINCREMENT,
    nonce TEXT NOT NULL,
    name TEXT NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    services TEXT NOT NULL,
    expires_us INTEGER NOT NULL
);

CREATE TABLE partitions (
    target INTEGER PRIMARY KEY,
    service TEXT NOT NULL,
    partition INTEGER NOT NULL,
    owner INTEGER,
    clean INTEGER NOT NULL DEFAULT 1,
    position INTEGER NOT NULL DEFAULT 0
);

CREATE TABLE runs (
    no INTEGER PRIMARY KEY,
    service TEXT NOT NULL,
    id TEXT NOT NULL,
    target INTEGER NOT NULL,
    workflow TEXT NOT NULL,
    version INTEGER NOT NULL,
    mode TEXT NOT NULL,
    home TEXT NOT NULL,
    status TEXT NOT NULL,
    holder TEXT NOT NULL,
    hop INTEGER NOT NULL,
    header TEXT NOT NULL,
    trail TEXT NOT NULL,
    attributes TEXT NOT NULL,
    wake_us INTEGER,
    reason TEXT NOT NULL,
    deaths INTEGER NOT NULL,
    started_us INTEGER NOT NULL,
    ended_us INTEGER,
    result TEXT,
    undone INTEGER NOT NULL,
    entries INTEGER NOT NULL
);
CREATE UNIQUE INDEX runs_by_id ON runs (id, service);
CREATE INDEX runs_live ON runs (target) WHERE status IN ('running', 'stuck');
CREATE INDEX runs_due ON runs (wake_us) WHERE wake_us IS NOT NULL;
CREATE INDEX runs_ended ON runs (ended_us) WHERE ended_us IS NOT NULL;

CREATE TABLE journal (run INTEGER NOT NULL, seq INTEGER NOT NULL, body TEXT NOT NULL);
CREATE UNIQUE INDEX journal_by_run ON journal (run, seq);

CREATE TABLE log (
    pos INTEGER PRIMARY KEY AUTOINCREMENT,
    target INTEGER NOT NULL,
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    receiver TEXT NOT NULL,
    run TEXT NOT NULL,
    at_us INTEGER NOT NULL,
    origin INTEGER,
    body TEXT NOT NULL
);

CREATE TABLE inbox (
    id TEXT NOT NULL,
    service TEXT NOT NULL,
    at_us INTEGER NOT NULL,
    passed_to TEXT NOT NULL,
    PRIMARY KEY (id, service)
) WITHOUT ROWID;

CREATE TABLE mailbox (
    no INTEGER PRIMARY KEY,
    service TEXT NOT NULL,
    run TEXT NOT NULL,
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    body TEXT NOT NULL,
    at_us INTEGER NOT NULL
);
CREATE UNIQUE INDEX mailbox_by_run ON mailbox (run, service, id);

CREATE TABLE parked (
    id TEXT NOT NULL,
    service TEXT NOT NULL,
    run TEXT NOT NULL,
    target INTEGER NOT NULL,
    call TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    due_us INTEGER NOT NULL,
    began_us INTEGER NOT NULL,
    beat TEXT NOT NULL,
    error TEXT NOT NULL,
    deaths INTEGER NOT NULL,
    PRIMARY KEY (id, service)
) WITHOUT ROWID;
CREATE INDEX parked_due ON parked (due_us);
CREATE INDEX parked_by_run ON parked (run, service);
