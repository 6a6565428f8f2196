"""The native API, ``/api/v1``: operations without an equivalent in the APIs of AWS and OpenAI."""
