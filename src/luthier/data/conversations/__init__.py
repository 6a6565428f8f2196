"""Conversations to token ids: templates, tools, reasoning and marks of learned turns."""
