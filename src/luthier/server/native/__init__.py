"""The native face, ``/api/v1``: what the other two cannot say, with its own OpenAPI document."""
