-- Who else is there, and whose lease is over first: a node looks so while it renews. Reads all nodes.
SELECT count(*) FILTER (WHERE no <> ?1), coalesce(max(no) FILTER (WHERE no <> ?1), 0),
    count(*) FILTER (WHERE asked <> ''), coalesce(min(expires_us) FILTER (WHERE no <> ?1), ?2)
FROM nodes
