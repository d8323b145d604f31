-- Note that a run waits for an event, or which one it was given. Index: primary key.
INSERT INTO awaits (service, type, key, run, id, at_us, reply, pos)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (run, id) DO UPDATE SET
    at_us = excluded.at_us, reply = excluded.reply, pos = excluded.pos
