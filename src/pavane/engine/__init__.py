"""The engine: drives runs, executes steps, moves messages; one duty a file."""
