"""Life after deployment: capture of requests, feedback, and rows from both."""
