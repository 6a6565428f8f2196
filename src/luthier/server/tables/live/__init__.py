"""Tables of deployed models: captured requests, canaries, schedules and alerts."""
