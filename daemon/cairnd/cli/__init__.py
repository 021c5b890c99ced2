"""The ``cairn`` command: what an operator sees and does. Talks to the daemon, or reads a store while it is down."""
