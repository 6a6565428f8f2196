"""Tables of the OpenAI API."""
