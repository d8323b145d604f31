-- Note that a handler handled an event again: a retried dead letter, or a replay.
INSERT INTO marks (handler, pos, at_us, took_us, attempts, outcome, variant)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (handler, pos) DO UPDATE SET
    at_us = excluded.at_us, took_us = excluded.took_us, attempts = excluded.attempts,
    outcome = excluded.outcome, variant = excluded.variant
