-- Take an event into a handler's custody, or write its next attempt. Index: primary key.
INSERT INTO parked_events (
    handler, pos, slot, key, attempt, due_us, began_us, error, deaths, again, data, dead
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (handler, pos) DO UPDATE SET
    slot = excluded.slot, key = excluded.key, attempt = excluded.attempt, due_us = excluded.due_us,
    began_us = excluded.began_us, error = excluded.error, deaths = excluded.deaths,
    again = excluded.again, data = excluded.data, dead = excluded.dead
