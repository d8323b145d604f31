"""Programs to read, run and change; `README.md` beside this file says what each one shows."""
