"""Shared HTTP layer of all APIs: connections, authentication, requests, responses and limits."""
