"""The OpenAI API for unmodified ``openai`` clients, with one file for each resource."""

from __future__ import annotations

from luthier.server.openai.routes import OpenAIService

__all__ = ["OpenAIService"]
