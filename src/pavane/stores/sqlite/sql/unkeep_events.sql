-- Let go of events whose time was over before ?1, at most ?2. Index: kept_events_by_expiry.
DELETE FROM kept_events WHERE (service, type, key, pos) IN (
    SELECT service, type, key, pos FROM kept_events WHERE expires_us < ?1 LIMIT ?2
)
