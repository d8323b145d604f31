-- Keep an event that a handler gave up.
INSERT INTO dead_letters (
    handler, pos, slot, key, type, event, at_us, attempts, cause, error, data, holds, asked, again
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
