-- Write what the monitor knows of a conversation. Index: primary key.
INSERT INTO conversations (
    contract, id, key, started_us, due_us, ended_us, first_end, ends, last, last_us, milestones,
    raised
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (contract, id) DO UPDATE SET
    key = excluded.key, started_us = excluded.started_us, due_us = excluded.due_us,
    ended_us = excluded.ended_us, first_end = excluded.first_end, ends = excluded.ends,
    last = excluded.last, last_us = excluded.last_us, milestones = excluded.milestones,
    raised = excluded.raised
