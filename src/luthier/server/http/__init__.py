"""The layer that all faces share: connections, requests and responses, limits, and who sent what."""
