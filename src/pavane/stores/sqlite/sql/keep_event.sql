-- Keep an event for runs that may wait for it. Index: primary key.
INSERT INTO kept_events (service, type, key, pos, expires_us)
VALUES (?, ?, ?, ?, ?)
ON CONFLICT (service, type, key, pos) DO NOTHING
