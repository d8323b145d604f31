-- Note that a run waits for an event, or which one it was given. Index: primary key.
INSERT INTO awaits (service, type, key, run, id, at_us, reply, pos)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (run, id) DO UPDATE SET
    service = excluded.service, type = excluded.type, key = excluded.key,
    at_us = excluded.at_us, reply = excluded.reply, pos = excluded.pos
