"""The web console: static files for a browser. The pages use the native and OpenAI APIs."""
