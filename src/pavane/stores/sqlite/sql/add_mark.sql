-- Note that a handler handled an event; a second mark is a constraint error and refuses its commit.
INSERT INTO marks (handler, pos, at_us, took_us, attempts, outcome, variant)
VALUES (?, ?, ?, ?, ?, ?, ?)
