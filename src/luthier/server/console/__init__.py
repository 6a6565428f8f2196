"""The web console: static files for a browser, which asks the native face for everything it shows."""
