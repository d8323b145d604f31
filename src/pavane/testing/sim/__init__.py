"""The engine in a deterministic simulation: one seed decides everything that happens.

`clock` has virtual time and the event loops of the simulated processes, `database` the store that
they share and what may go wrong with it, `process` the processes and how they end, `storm` what a
seed lets happen. `outside` is the world that steps act upon, `checks` what must hold in the end.
"""
