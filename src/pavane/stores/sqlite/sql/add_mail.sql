-- Keep an event for a run that does not wait for it yet; a repetition changes nothing.
INSERT INTO mailbox (service, run, id, type, body, at_us)
VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (run, service, id) DO NOTHING
