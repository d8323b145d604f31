-- Forget conversations that ended before ?1, at most ?2. Index: conversations_ended.
DELETE FROM conversations WHERE (contract, id) IN (
    SELECT contract, id FROM conversations WHERE ended_us < ?1 LIMIT ?2
)
