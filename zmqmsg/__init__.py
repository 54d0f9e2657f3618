"""A minimal command-line REQ/REP messenger on ZeroMQ."""
