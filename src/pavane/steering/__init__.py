"""What people ask of events, handlers and dead letters: looking, pausing, replaying, retrying."""
