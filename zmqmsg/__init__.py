"""A minimal command-line REQ/REP messenger on ZeroMQ."""

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"
