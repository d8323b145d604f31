-- Forget a handler's state of one key. Index: primary key.
DELETE FROM states WHERE service = ? AND name = ? AND key = ?
