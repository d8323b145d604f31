-- Append to the event log at a position chosen under the writer's lock; an id that is there stays.
INSERT INTO events (
    pos, slot, id, type, version, key, source, at_us, conversation, cause, trace, data
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO NOTHING
