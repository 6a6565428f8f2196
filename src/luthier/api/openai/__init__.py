"""The OpenAI API: what the unmodified ``openai`` client uses. One file for each resource."""

from __future__ import annotations

from luthier.api.openai.face import OpenAIFace

__all__ = ["OpenAIFace"]
