-- Which database this is, and how often it was accepted after it was put back; and when, by its own
-- clock, each node last said that it works here. What machines keep of that outside tells a backup
-- that was put back. Rows of nodes that left stay for a while.

CREATE TABLE pavane.past (cluster text NOT NULL, generation bigint NOT NULL);
INSERT INTO pavane.past VALUES (gen_random_uuid()::text, 1);

CREATE TABLE pavane.beats (nonce text PRIMARY KEY, beaten_us bigint NOT NULL)
WITH (fillfactor = 50);
