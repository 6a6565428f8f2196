"""Database tables of the service, and the built-in object store."""
