"""The native API, ``/api/v1``: operations that the APIs of AWS and OpenAI do not have."""
