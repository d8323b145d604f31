-- Mark a message as consumed; a second mark is a constraint error and refuses its commit.
INSERT INTO inbox (id, service, at_us, passed_to)
VALUES (?, ?, ?, ?)
