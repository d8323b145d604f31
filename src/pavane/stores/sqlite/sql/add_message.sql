-- Append to the log at a position chosen under the writer's lock, so position order is commit order.
INSERT INTO log (pos, target, kind, id, receiver, run, at_us, origin, body)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
