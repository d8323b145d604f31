-- `write_1` takes the name of its argument `lease_us` for that of the column which 004 brought, and which
-- nodes of the version before leave empty: nothing that they wrote was taken any more.
DO $$
BEGIN
    EXECUTE replace(
        pg_get_functiondef('pavane.write_1'::regproc),
        'pavane.clock_us() + lease_us', 'pavane.clock_us() + write_1.lease_us'
    );
END $$;
