"""The web console: static files for a browser, which query the native and OpenAI APIs."""
