-- Note that an event started a run. Index: primary key.
INSERT INTO members (conversation, run)
VALUES (?, ?)
ON CONFLICT (conversation, run) DO NOTHING
