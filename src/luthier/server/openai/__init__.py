"""The OpenAI API: what the unmodified ``openai`` client uses. One file for each resource."""

from __future__ import annotations

from luthier.server.openai.routes import OpenAIService

__all__ = ["OpenAIService"]
