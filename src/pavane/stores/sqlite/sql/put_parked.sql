-- Take a step into custody, or write its next attempt. Index: primary key.
INSERT INTO parked (
    id, service, run, target, call, attempt, due_us, began_us, beat, error, deaths
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id, service) DO UPDATE SET
    attempt = excluded.attempt, due_us = excluded.due_us, beat = excluded.beat,
    error = excluded.error, deaths = excluded.deaths
