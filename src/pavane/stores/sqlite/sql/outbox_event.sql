-- Append an event inside a transaction of a user's, whose write lock orders positions like commits:
-- what a rollback takes back, the next one gets. An id that is there stays. Index: events_by_id.
INSERT INTO main.events (
    slot, id, type, version, key, source, at_us, conversation, cause, trace, data
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO NOTHING
