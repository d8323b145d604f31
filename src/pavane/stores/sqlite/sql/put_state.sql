-- Save a handler's state of one key. Index: primary key.
INSERT INTO states (service, name, key, body)
VALUES (?, ?, ?, ?)
ON CONFLICT (service, name, key) DO UPDATE SET body = excluded.body
