"""Chat models used as teachers and judges: local models and OpenAI-compatible endpoints."""
