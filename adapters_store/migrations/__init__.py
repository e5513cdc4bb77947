"""How a catalogue is brought from one release's tables to the next's (alembic)."""
