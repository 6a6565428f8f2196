"""Answers from documents: files to passages, an index with search, and prompts with citations."""
