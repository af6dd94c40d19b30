"""The server: one loop that owns the state, the HTTP API in front of it, the attempts that it runs."""
