"""Tiny configurations of published model families, for tests and for the table of the guide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from luthier.models.networks.probe import UNSUPPORTED

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
}
WINDOW = 16
"""Attention window of families with sliding windows, in tokens."""


@dataclass(frozen=True)
class Family:
    """A model family with a tiny configuration."""

    name: str
    """Name of the published models."""
    model_type: str
    """transformers' name of the architecture."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the configuration that differ from :data:`SIZES`; ``...`` removes a field."""
    every_run: bool = False
    """True if the tests of every run include the family; False for slow tests only."""

    @property
    def id(self) -> str:
        """Name of the family's tests."""
        return self.name.lower().replace(" ", "-")

    @property
    def refused(self) -> str:
        """Reason why luthier rejects the family; empty for a supported family."""
        return UNSUPPORTED.get(self.model_type, ("", ()))[0]

    def config(self) -> PreTrainedConfig:
        """Return the tiny configuration."""
        fields = {
            name: value for name, value in {**SIZES, **self.settings}.items() if value is not ...
        }
        return AutoConfig.for_model(self.model_type, **fields)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_WINDOWS = {"sliding_window": WINDOW}
_ALTERNATING = {**_WINDOWS, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {**_ALTERNATING, "query_pre_attn_scalar": 8}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA_2 = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64,
}

DECODERS = (
    Family("Llama 2", "llama", {"num_key_value_heads": 4}),
    Family(
        "Llama 3",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        every_run=True,
    ),
    Family(
        "Llama 4",
        "llama4_text",
        {
            **_LOCAL_EXPERTS,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
        },
    ),
    Family("Mistral", "mistral", _WINDOWS),
    Family("Ministral", "ministral", _ALTERNATING),
    Family("Ministral 3", "ministral3"),
    Family("Mixtral", "mixtral", _LOCAL_EXPERTS),
    Family("Qwen 2.5", "qwen2"),
    Family(
        "Qwen 2 with windows",
        "qwen2",
        {**_WINDOWS, "use_sliding_window": True, "max_window_layers": 1},
    ),
    Family("Qwen 2 MoE", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    Family("Qwen 3", "qwen3"),
    Family("Qwen 3 MoE", "qwen3_moe", EXPERTS),
    Family(
        "Qwen 3 Next", "qwen3_next", {**EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 16}
    ),
    Family("Qwen 3.5", "qwen3_5_text", _LINEAR),
    Family(
        "Qwen 3.5 MoE",
        "qwen3_5_moe_text",
        {**EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 16},
    ),
    Family("Gemma", "gemma"),
    Family(
        "Gemma 2",
        "gemma2",
        {**_GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
        every_run=True,
    ),
    Family("Gemma 3", "gemma3_text", _GEMMA),
    Family(
        "Gemma 3n",
        "gemma3n_text",
        {
            **_ALTERNATING,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": None,
        },
    ),
    Family(
        "Gemma 4",
        "gemma4_text",
        {
            **_ALTERNATING,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
            "global_head_dim": 16,
            "num_kv_shared_layers": 0,
        },
    ),
    Family(
        "Gemma 4 E2B",
        "gemma4_text",
        {
            **_WINDOWS,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
            "global_head_dim": 16,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 3.0,
        },
    ),
    Family("VaultGemma", "vaultgemma", _GEMMA),
    Family("Phi-2", "phi"),
    Family("Phi-3", "phi3", _WINDOWS),
    Family(
        "Phi-4-mini", "phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 64}
    ),
    Family("Phi-3.5 MoE", "phimoe", _LOCAL_EXPERTS),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", _ALTERNATING),
    Family("OLMoE", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("FlexOlmo", "flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("Command R", "cohere", {"logit_scale": 0.5}),
    Family("Command R7B", "cohere2", {**_ALTERNATING, "logit_scale": 0.5}),
    Family(
        "Granite 3",
        "granite",
        {
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    Family(
        "Granite 3 MoE",
        "granitemoe",
        {
            **_LOCAL_EXPERTS,
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    Family(
        "Granite 4",
        "granitemoehybrid",
        {
            **_LOCAL_EXPERTS,
            **_MAMBA_2,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 16,
            "logits_scaling": 4.0,
        },
    ),
    Family("StarCoder 2", "starcoder2", _WINDOWS),
    Family("StableLM", "stablelm"),
    Family("SmolLM 3", "smollm3", {"no_rope_layer_interval": 2, "num_hidden_layers": 4}),
    Family("GPT-2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    Family("GPT-J", "gptj", {"rotary_dim": 4}),
    Family(
        "GPT-Neo",
        "gpt_neo",
        {
            "attention_types": [[["global", "local"], 1]],
            "num_layers": 2,
            "num_heads": 4,
            "window_size": WINDOW,
        },
    ),
    Family("GPT-NeoX", "gpt_neox"),
    Family("GPT-BigCode", "gpt_bigcode"),
    Family("CodeGen", "codegen", {"rotary_dim": 4}),
    Family("OPT", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("BLOOM", "bloom", {"n_layer": 2, "n_head": 4}),
    Family("MPT", "mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    Family("Falcon", "falcon", {"head_dim": ...}),
    Family("Falcon 3", "llama"),
    Family("Falcon H1", "falcon_h1", {**_MAMBA_2, "mamba_d_ssm": 64}),
    Family("Falcon Mamba", "falcon_mamba", {"state_size": 8, "time_step_rank": 4}),
    Family("Mamba", "mamba", {"state_size": 8, "time_step_rank": 4}),
    Family(
        "Mamba 2",
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    Family(
        "Jamba",
        "jamba",
        {
            **EXPERTS,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    Family("Bamba", "bamba", {**_MAMBA_2, "attn_layer_indices": [1]}),
    Family(
        "Zamba 2",
        "zamba2",
        {
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
        },
    ),
    Family("LFM 2", "lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    Family(
        "LFM 2 MoE",
        "lfm2_moe",
        {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    Family(
        "RecurrentGemma",
        "recurrent_gemma",
        {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 64},
    ),
    Family("RWKV", "rwkv", {"attention_hidden_size": 32, "rescale_every": 1}),
    Family("Nemotron", "nemotron"),
    Family(
        "Nemotron-H",
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    Family("Apertus", "apertus"),
    Family(
        "EXAONE 4", "exaone4", {**_WINDOWS, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    Family("GLM 4", "glm"),
    Family("GLM 4 0414", "glm4"),
    Family("GLM 4.5", "glm4_moe", {**LATENT, "num_key_value_heads": 2}),
    Family("gpt-oss", "gpt_oss", {**_LOCAL_EXPERTS, **_ALTERNATING}),
    Family("DeepSeek V2", "deepseek_v2", LATENT),
    Family("DeepSeek V3", "deepseek_v3", LATENT),
    Family("Dots 1", "dots1", {**LATENT, "num_key_value_heads": 2}),
    Family("Ernie 4.5", "ernie4_5"),
    Family(
        "Ernie 4.5 MoE",
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    ),
    Family("Helium", "helium"),
    Family("Arcee", "arcee"),
    Family("Seed-OSS", "seed_oss"),
    Family("HunYuan", "hunyuan_v1_dense"),
    Family("BitNet", "bitnet"),
    Family("DiffLlama", "diffllama"),
    Family("Doge", "doge", {"keep_window_size": 256}),
    Family(
        "MiniMax",
        "minimax",
        {**_LOCAL_EXPERTS, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]},
    ),
    Family(
        "MiniCPM 3",
        "minicpm3",
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    Family(
        "JetMoE", "jetmoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    ),
    Family("Persimmon", "persimmon"),
    Family("XGLM", "xglm", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}),
    Family("BioGPT", "biogpt"),
    Family(
        "GPT",
        "openai-gpt",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
    Family(
        "ModernBERT decoder",
        "modernbert-decoder",
        {
            "sliding_window": WINDOW,
            "local_attention": WINDOW,
            "cls_token_id": 0,
            "sep_token_id": 1,
            "bos_token_id": 0,
        },
    ),
)
"""Decoders: text generation."""

_BERT = {"num_key_value_heads": ..., "head_dim": ..., "max_position_embeddings": 130}
ENCODERS = (
    Family("BERT", "bert", _BERT, every_run=True),
    Family("RoBERTa", "roberta", _BERT),
    Family("XLM-RoBERTa", "xlm-roberta", _BERT),
    Family("CamemBERT", "camembert", _BERT),
    Family("ELECTRA", "electra", {**_BERT, "embedding_size": 16}),
    Family("ALBERT", "albert", {**_BERT, "embedding_size": 16}),
    Family(
        "DistilBERT",
        "distilbert",
        {**_BERT, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    Family("MPNet", "mpnet", _BERT),
    Family(
        "DeBERTa",
        "deberta",
        {
            **_BERT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_biased_input": False,
        },
    ),
    Family(
        "DeBERTa v3",
        "deberta-v2",
        {
            **_BERT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_biased_input": False,
            "position_buckets": 16,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    Family(
        "ModernBERT",
        "modernbert",
        {
            **_BERT,
            "local_attention": WINDOW,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 0,
            "sep_token_id": 1,
        },
    ),
    Family("EuroBERT", "eurobert", {"num_key_value_heads": 2, "mask_token_id": 3}),
    Family("NomicBERT", "nomic_bert", _BERT),
    Family("ERNIE", "ernie", _BERT),
    Family("RoFormer", "roformer", {**_BERT, "embedding_size": 32}),
    Family(
        "ConvBERT",
        "convbert",
        {**_BERT, "embedding_size": 32},
    ),
    Family(
        "MobileBERT",
        "mobilebert",
        {**_BERT, "embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    Family("Megatron-BERT", "megatron-bert", _BERT),
    Family(
        "RemBERT", "rembert", {**_BERT, "input_embedding_size": 16, "output_embedding_size": 24}
    ),
    Family("data2vec", "data2vec-text", _BERT),
    Family(
        "ESM",
        "esm",
        {**_BERT, "position_embedding_type": "rotary", "token_dropout": False, "mask_token_id": 3},
    ),
    Family("GTE", "gte", _BERT),
)
"""Bidirectional encoders: labels, tags, embeddings, masked language models."""

_NAMES_OF_DECODERS = (
    "head_dim",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
_NO_DECODER: dict[str, Any] = {**dict.fromkeys(_NAMES_OF_DECODERS, ...), "pad_token_id": 0}
_T5: dict[str, Any] = {
    **_NO_DECODER,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART_SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_BART: dict[str, Any] = {
    **_NO_DECODER,
    **BART_SIZES,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
_T5GEMMA: dict[str, Any] = {
    **{name: value for name, value in SIZES.items() if name != "initializer_range"},
    **_GEMMA,
    "pad_token_id": 0,
    "bos_token_id": 3,
    "final_logit_softcapping": 3.0,
}
ENCODER_DECODERS = (
    Family("T5", "t5", _T5),
    Family(
        "Flan-T5", "t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    Family("mT5", "mt5", _T5),
    Family("umT5", "umt5", _T5),
    Family("LongT5", "longt5", _T5),
    Family("BART", "bart", _BART, every_run=True),
    Family("mBART", "mbart", _BART),
    Family("M2M-100", "m2m_100", _BART),
    Family("Marian", "marian", _BART),
    Family("Pegasus", "pegasus", _BART),
    Family("BlenderBot", "blenderbot", _BART),
    Family("PLBART", "plbart", _BART),
    Family("T5Gemma", "t5gemma", {**_NO_DECODER, "encoder": _T5GEMMA, "decoder": _T5GEMMA}),
)
"""Encoder-decoders: text from text."""
