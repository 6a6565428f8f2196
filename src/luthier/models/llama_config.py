"""What ``config.json`` of a network of Llama's family says, where all of it is known here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_Count = Annotated[int, Field(ge=1, le=1 << 24)]
_UNREAD = frozenset(
    ("_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
     "initializer_range", "is_llama_config", "pad_token_id", "pretraining_tp", "rope_interleaved",
     "torch_dtype", "transformers_version", "unk_token_id", "use_cache")
)  # fmt: skip
"""Fields of ``config.json`` that decide nothing, or nothing with the values that are taken here."""

_MAY_BE_NULL = frozenset({"head_dim", "num_key_value_heads", "rope_parameters", "rope_scaling"})
_TYPES = (None, "float32", "bfloat16", "float16")


class RopeParameters(BaseModel):
    """How positions are turned: Su et al. 2021 (arXiv:2104.09864), and Llama 3.1's longer contexts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_type: Literal["default", "llama3"] = "default"
    factor: float | None = Field(default=None, gt=0)
    low_freq_factor: float | None = Field(default=None, gt=0)
    high_freq_factor: float | None = Field(default=None, gt=0)
    original_max_position_embeddings: _Count | None = None

    @model_validator(mode="after")
    def _check_type(self) -> RopeParameters:
        longer = (
            self.factor, self.low_freq_factor, self.high_freq_factor,
            self.original_max_position_embeddings,
        )  # fmt: skip
        if any((each is None) == (self.rope_type == "llama3") for each in longer):
            raise ValueError("llama3 has all four fields, and others have none of them")
        return self


class LlamaConfig(BaseModel):
    """The fields of ``config.json`` that decide what the network computes, by their names there."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model_type: Literal["llama"]
    vocab_size: _Count
    hidden_size: _Count
    intermediate_size: _Count
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)]
    num_attention_heads: _Count
    num_key_value_heads: _Count
    head_dim: _Count
    max_position_embeddings: _Count
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    rope_parameters: dict[str, Any]
    """The fields of :class:`RopeParameters` as the file has them, by the names of transformers 5."""
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @model_validator(mode="after")
    def _check(self) -> LlamaConfig:
        RopeParameters.model_validate(self.rope_parameters, strict=True)
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("heads do not share keys evenly")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError("the padding is no token")
        return self

    @property
    def numbers(self) -> int:
        """Numbers of its weights; those of a tied output head count once."""
        width, inner = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        attention = 2 * width * (queries + keys)
        attention += (queries + 2 * keys + width) if self.attention_bias else 0
        mlp = 3 * width * inner + ((2 * inner + width) if self.mlp_bias else 0)
        tables = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return tables + self.num_hidden_layers * (attention + mlp + 2 * width) + width

    @property
    def rope(self) -> RopeParameters:
        """How positions are turned."""
        return RopeParameters.model_validate(self.rope_parameters, strict=True)

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return self.model_dump()

    @staticmethod
    def of(fields: Mapping[str, Any]) -> LlamaConfig | None:
        """From the fields of ``config.json``; ``None`` for what is not known here."""
        if fields.get("model_type") != "llama":
            return None
        plain = {
            "architectures": ["LlamaForCausalLM"], "attention_dropout": 0.0, "pretraining_tp": 1,
            "rope_interleaved": False, "is_llama_config": True,
        }  # fmt: skip
        if any(fields.get(name, value) != value for name, value in plain.items()):
            return None
        # What transformers refuses is for it to refuse, also in fields that decide nothing.
        if type(fields.get("use_cache", True)) is not bool or not all(
            type(fields.get(name, 0.02)) is float for name in ("initializer_range", "rms_norm_eps")
        ):
            return None
        if any(fields.get(name) not in _TYPES for name in ("dtype", "torch_dtype")):
            return None
        known = {
            name: value
            for name, value in fields.items()
            if name not in _UNREAD and (value is not None or name not in _MAY_BE_NULL)
        }
        ends = ("pad_token_id", "bos_token_id", "eos_token_id")
        known |= {name: fields[name] for name in ends if name in fields}
        try:
            # Before transformers 5 rotary positions had two fields.
            given = known.pop("rope_parameters", None) or known.pop("rope_scaling", None) or {}
            rope = {**given}
            if "type" in rope:
                rope.setdefault("rope_type", rope.pop("type"))
            if "rope_theta" in known:
                rope.setdefault("rope_theta", known.pop("rope_theta"))
            heads = known["num_attention_heads"]
            known.setdefault("num_key_value_heads", heads)
            known.setdefault("head_dim", known["hidden_size"] // heads)
            rope = {"rope_theta": 10_000.0, "rope_type": "default"} | rope
            return LlamaConfig.model_validate(known | {"rope_parameters": rope}, strict=True)
        except (ValidationError, KeyError, TypeError, ValueError, ZeroDivisionError):
            return None  # transformers says what is wrong
