-- Record what a shadow handler would have published. Index: primary key.
INSERT INTO shadows (handler, pos, at_us, events, error)
VALUES (?, ?, ?, ?, ?)
ON CONFLICT (handler, pos) DO UPDATE SET
    at_us = excluded.at_us, events = excluded.events, error = excluded.error
