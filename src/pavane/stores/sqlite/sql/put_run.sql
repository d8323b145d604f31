-- Insert a run or replace the changing columns of one. Index: primary key, runs_by_id (a second run of
-- an id at a service is a constraint error). Locks: the writer's.
INSERT INTO runs (
    no, service, id, target, workflow, version, mode, home, status, holder, hop, header, trail,
    attributes, wake_us, reason, deaths, started_us, ended_us, result, undone, entries
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (no) DO UPDATE SET
    mode = excluded.mode, status = excluded.status, holder = excluded.holder, hop = excluded.hop,
    header = excluded.header, trail = excluded.trail, attributes = excluded.attributes,
    wake_us = excluded.wake_us, reason = excluded.reason, deaths = excluded.deaths,
    ended_us = excluded.ended_us, result = excluded.result, undone = excluded.undone,
    entries = excluded.entries
