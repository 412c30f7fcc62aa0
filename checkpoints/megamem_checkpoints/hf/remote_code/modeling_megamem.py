"""Inference of megamem models in transformers: attention, experts, Engram tables and memory banks.

Shapes: ``b`` sequences, ``s`` new tokens, ``h`` hidden units.
"""
# ruff: noqa: RUF012 (class attributes that transformers reads)

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_megamem import MegamemConfig
from .table_megamem import MegamemTable, MegamemTableShard, attach_tables, checkpoint_reader


class MegamemRMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) whose scale is ``1 + weight`` or, not zero-centred, ``weight``; computed in fp32."""

    def __init__(self, size: int, eps: float, zero_centered: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if zero_centered else torch.ones(size))
        self.eps = eps
        self.zero_centered = zero_centered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.float()
        scale = 1.0 + weight if self.zero_centered else weight
        return F.rms_norm(x.float(), weight.shape, scale, self.eps).to(x.dtype)


class MegamemRotaryEmbedding(nn.Module):
    """Angles of RoPE (arXiv 2104.09864), two halves of a head rotated against each other."""

    def __init__(self, config: MegamemConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        initialise = (
            self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        inv_freq, self.attention_scaling = initialise(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MegamemConfig, **_) -> tuple[torch.Tensor, float]:
        """Inverse frequencies ``[head_dim / 2]`` and the scale of cosine and sine."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine ``[b, s, head_dim]`` in the dtype of ``x``."""
        angles = position_ids[..., None].float() * self.inv_freq.float().to(x.device)
        angles = torch.cat((angles, angles), dim=-1)
        scale = self.attention_scaling
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads ``[b, heads, s, head_dim]`` by the angles of their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention that also returns its weights ``[b, heads, s, keys]``."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MegamemAttention(nn.Module):
    """Grouped-query attention with RoPE and norms of queries and keys."""

    def __init__(self, config: MegamemConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        size, queries = config.hidden_size, config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(size, queries, bias=False)
        self.k_proj = nn.Linear(size, keys, bias=False)
        self.v_proj = nn.Linear(size, keys, bias=False)
        self.o_proj = nn.Linear(queries, size, bias=False)
        norm = (self.head_dim, config.rms_norm_eps, config.zero_centered_norms)
        self.q_norm = MegamemRMSNorm(*norm) if config.qk_layernorm else nn.Identity()
        self.k_norm = MegamemRMSNorm(*norm) if config.qk_layernorm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        query = rotate(self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2), *position_embeddings)
        key = rotate(self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2), *position_embeddings)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, sliding_window=None, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights


class MegamemMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MegamemTopKRouter(nn.Module):
    """Choice of experts, in fp32: the best softmax or sigmoid scores, normalised to sum 1 where there are several.

    A bias (``sigmoid_bias``, arXiv 2408.15664) moves the choice, not the weights.
    """

    def __init__(self, config: MegamemConfig):
        super().__init__()
        self.topk = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.sigmoid = config.moe_router == "sigmoid_bias"
        if self.sigmoid:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and experts, ``[tokens, topk]`` each."""
        logits = F.linear(tokens.float(), self.weight.float())
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1)
        ranked = scores + self.e_score_correction_bias if self.sigmoid else scores
        experts = ranked.topk(self.topk, dim=-1).indices
        weights = scores.gather(1, experts)
        if self.topk > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights, experts


class MegamemMoE(nn.Module):
    """Mixture of experts, and a shared expert that every token uses."""

    def __init__(self, config: MegamemConfig):
        super().__init__()
        size = config.hidden_size
        self.gate = MegamemTopKRouter(config)
        self.experts = nn.ModuleList(MegamemMLP(size, config.moe_intermediate_size) for _ in range(config.num_experts))
        shared = config.shared_expert_intermediate_size
        self.shared_experts = MegamemMLP(size, shared) if shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        weights, experts = self.gate(tokens)
        output = torch.zeros_like(tokens)
        for expert in experts.unique().tolist():
            token, slot = torch.where(experts == expert)
            share = self.experts[expert](tokens[token]) * weights[token, slot, None].to(x.dtype)
            output.index_add_(0, token, share)
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        return output.view_as(x)


class MegamemNgramHash(nn.Module):
    """Rows of hashed n-grams: one row per order and head (arXiv 2601.07372, section 2.2)."""

    def __init__(self, config: MegamemConfig, layer_idx: int):
        super().__init__()
        index = config.engram_layers.index(layer_idx)
        self.orders, self.heads, self.pad_id = config.engram_orders, config.engram_heads, config.engram_pad_id
        self.constants = {
            "multipliers": [int(m) for m in config.engram_multipliers[index]],
            "primes": config.engram_primes[index],
            "offsets": [sum(config.engram_primes[index][:i]) for i in range(len(config.engram_primes[index]))],
        }
        for name, values in self.constants.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(self, ids: torch.Tensor, documents: torch.Tensor, fold: torch.Tensor | None, new: int) -> torch.Tensor:
        """Rows ``[b, new, orders * heads]`` of the last ``new`` positions.

        ``ids`` and ``documents`` are ``[b, past + new]``; look-back stops where the document changes.
        """
        past = ids.shape[1] - new
        pad = self.pad_id
        if fold is not None:
            ids, pad = fold[ids], fold[pad]
        mix = ids[:, past:] * self.multipliers[0]
        rows = []
        for back in range(1, max(self.orders)):
            same = documents[:, past - back : past - back + new] == documents[:, past:]
            earlier = torch.where(same, ids[:, past - back : past - back + new], pad)
            mix = mix ^ (earlier * self.multipliers[back])
            heads = slice((back - 1) * self.heads, back * self.heads)
            rows.append(mix[..., None] % self.primes[heads] + self.offsets[heads])
        return torch.cat(rows, dim=-1)


class MegamemEngram(nn.Module):
    """Conditional memory by n-gram look-up (arXiv 2601.07372, section 2.3), for one residual stream.

    Cached per layer: the last ``history`` tokens as ``id + 1`` (0: nothing), and the tail of the convolution's input.
    """

    def __init__(self, config: MegamemConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.sqrt_gate = config.engram_sqrt_gate
        self.eos_token_id = config.eos_token_id
        self.taps, self.dilation = config.engram_conv_kernel_size, max(config.engram_orders)
        self.tail = max(self.taps - 1, 0) * self.dilation
        self.history = max(self.tail, self.dilation - 1)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.hash = MegamemNgramHash(config, layer_idx)
        rows = sum(self.hash.constants["primes"])
        self.table = MegamemTable(config, rows, config.engram_width, config.engram_table_dtype)
        width = len(config.engram_orders) * config.engram_heads * config.engram_width
        self.key_proj = nn.Linear(width, size, bias=False)
        self.value_proj = nn.Linear(width, size, bias=False)
        self.norm_key = MegamemRMSNorm(size, eps)
        self.norm_query = MegamemRMSNorm(size, eps)
        if self.taps:
            self.norm_conv = MegamemRMSNorm(size, eps)
            self.conv_weight = nn.Parameter(torch.zeros(size, self.taps))

    def forward(
        self,
        hidden_states: torch.Tensor,
        tokens: torch.Tensor,
        fold: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """What is added to ``hidden_states [b, s, h]``; ``tokens [b, s]`` are ids plus one, 0 where masked."""
        new = tokens.shape[1]
        tokens = self._extend(tokens[:, None], self.history, 0, past_key_values)[:, 0]
        ends = (tokens == 0) | (tokens == self.eos_token_id + 1)
        documents = ends.cumsum(dim=1) - ends.long()

        rows = self.hash((tokens - 1).clamp_min(0), documents, fold, new)
        memory = self.table(rows, like=hidden_states).flatten(2)
        key, query = self.norm_key(self.key_proj(memory).float()), self.norm_query(hidden_states.float())
        score = (query * key).sum(dim=-1, keepdim=True) * query.shape[-1] ** -0.5
        if self.sqrt_gate:
            score = score.abs().clamp_min(1e-6).sqrt() * score.sign()
        gated = (score.sigmoid() * self.value_proj(memory)).to(hidden_states.dtype)
        return gated + self._convolve(gated, documents, past_key_values) if self.taps else gated

    def _convolve(self, gated: torch.Tensor, documents: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
        """SiLU of the dilated causal convolution ``[b, s, h]``; positions of other documents read as zero."""
        new = gated.shape[1]
        x = self._extend(self.norm_conv(gated).transpose(1, 2), self.tail, 1, past_key_values)
        documents = documents[:, None, documents.shape[1] - self.tail - new :]
        output = torch.zeros_like(x[..., :new])
        for tap in range(self.taps):
            window = slice(tap * self.dilation, tap * self.dilation + new)
            same = documents[..., window] == documents[..., self.tail :]
            output = output + self.conv_weight[:, tap, None] * x[..., window] * same
        return F.silu(output).transpose(1, 2)

    def _extend(self, x: torch.Tensor, length: int, state: int, past_key_values: Cache | None) -> torch.Tensor:
        """``x [b, channels, s]`` after its last ``length`` columns of earlier calls, or zeros."""
        new = x.shape[-1]
        if past_key_values is not None and length:
            x = past_key_values.update_conv_state(x, self.layer_idx, state_idx=state, conv_kernel_size=length)
        return F.pad(x, (length, 0))[..., -(length + new) :]


class MegamemBank(nn.Module):
    """Feed-forward blocks fetched by document (arXiv 2510.02375, appendix I): they widen the layer's SwiGLU."""

    def __init__(self, config: MegamemConfig):
        super().__init__()
        self.levels = [(level, units) for level, units in enumerate(config.bank_units, start=1) if units]
        self.branching = config.bank_branching
        for level, units in self.levels:
            rows, width = self.branching**level + 1, 3 * units * config.hidden_size
            self.add_module(f"level{level}", MegamemTable(config, rows, width, config.bank_table_dtype))

    def forward(self, x: torch.Tensor, memory_paths: torch.Tensor | None) -> torch.Tensor:
        """``x [b, s, h]``, ``memory_paths [b, levels]`` with -1 for the generic block; None: generic at all levels."""
        blocks = []
        for level, units in self.levels:
            table, generic = self.get_submodule(f"level{level}"), self.branching**level
            if memory_paths is None:
                rows = torch.full((x.shape[0],), generic, device=x.device)
            else:
                rows = memory_paths[:, level - 1]
                rows = torch.where(rows < 0, generic, rows)
            blocks.append(table(rows, like=x).view(x.shape[0], 3, units, x.shape[-1]))
        first, second, output = torch.cat(blocks, dim=2).unbind(dim=1)
        return (F.silu(x @ first.mT) * (x @ second.mT)) @ output


class MegamemMemoryRouter(nn.Module):
    """Cluster of a text at every level: TF-IDF of its tokens, truncated SVD, greedy descent to the nearest centroid."""

    def __init__(self, config: MegamemConfig):
        super().__init__()
        self.levels, self.branching = len(config.bank_units), config.bank_branching
        dimensions = config.router_dimensions
        self.register_buffer("idf", torch.zeros(config.vocab_size))
        self.register_buffer("components", torch.zeros(dimensions, config.vocab_size))
        for level in range(1, self.levels + 1):
            shape = (self.branching ** (level - 1), self.branching, dimensions)
            self.register_buffer(f"level{level}_centroids", torch.zeros(shape))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Paths ``[b, levels]`` int64 of ``input_ids [b, s]``; the end-of-document id has no weight."""
        counts = self.idf.new_zeros(len(input_ids), len(self.idf))
        counts.scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=counts.dtype))
        weights = torch.where(counts > 0, 1 + counts.clamp_min(1).log(), 0) * self.idf
        points = F.normalize(weights @ self.components.T, dim=-1)
        nodes = input_ids.new_zeros(len(input_ids))
        path = []
        for level in range(1, self.levels + 1):
            children = self.get_buffer(f"level{level}_centroids")[nodes]
            nearest = (points[:, None] - children).square().sum(dim=-1).argmin(dim=-1)
            nodes = nodes * self.branching + nearest
            path.append(nodes)
        return torch.stack(path, dim=-1)


class MegamemDecoderLayer(GradientCheckpointingLayer):
    """Engram, attention, and a feed-forward part that experts or memory blocks extend."""

    def __init__(self, config: MegamemConfig, layer_idx: int):
        super().__init__()
        size = config.hidden_size
        norm = (size, config.rms_norm_eps, config.zero_centered_norms)
        self.engram = MegamemEngram(config, layer_idx) if layer_idx in config.engram_layers else None
        self.input_layernorm = MegamemRMSNorm(*norm)
        self.self_attn = MegamemAttention(config, layer_idx)
        self.post_attention_layernorm = MegamemRMSNorm(*norm)
        moe = layer_idx in config.moe_layers
        self.mlp = MegamemMoE(config) if moe else MegamemMLP(size, config.intermediate_size)
        self.bank = MegamemBank(config) if layer_idx in config.bank_layers else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        token_fold: torch.Tensor | None = None,
        memory_paths: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if self.engram is not None:
            hidden_states = hidden_states + self.engram(hidden_states, tokens, token_fold, past_key_values)
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        hidden_states = hidden_states + self.mlp(normed)
        return hidden_states if self.bank is None else hidden_states + self.bank(normed, memory_paths)


class MegamemPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to initialise, place and cache the model."""

    config_class = MegamemConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegamemDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "memory_router"]
    _can_record_outputs = {"hidden_states": MegamemDecoderLayer, "attentions": MegamemAttention}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; `table_placement="cpu"` or `"disk"` keeps memory tables there whatever the device map."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.table_placement != "device":
            given = kwargs.get("state_dict")
            read = given.__getitem__ if given else checkpoint_reader(pretrained_model_name_or_path, kwargs)
            attach_tables(model, read)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MegamemRMSNorm):
            init.constant_(module.weight, 0.0 if module.zero_centered else 1.0)
        elif isinstance(module, MegamemTableShard) and module.placement == "device":
            if "scale" in module.shapes:
                init.zeros_(module.scale)
            else:
                init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, MegamemTopKRouter):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.sigmoid:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, MegamemNgramHash):
            for name, values in module.constants.items():
                init.copy_(getattr(module, name), torch.tensor(values, dtype=torch.int64))
        elif isinstance(module, MegamemEngram) and module.taps:
            init.zeros_(module.conv_weight)
        elif isinstance(module, MegamemMemoryRouter):
            for buffer in module.buffers():
                init.zeros_(buffer)
        elif isinstance(module, MegamemModel) and module.token_fold is not None:
            init.copy_(module.token_fold, torch.arange(self.config.vocab_size))


class MegamemModel(MegamemPreTrainedModel):
    """The decoder without its output projection."""

    def __init__(self, config: MegamemConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MegamemDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MegamemRMSNorm(config.hidden_size, config.rms_norm_eps, config.zero_centered_norms)
        self.rotary_emb = MegamemRotaryEmbedding(config)
        self.register_buffer("token_fold", torch.arange(config.vocab_size) if config.engram_fold_tokens else None)
        self.gradient_checkpointing = False
        if config.table_placement != "device":  # from_pretrained reads these itself
            self._keys_to_ignore_on_load_unexpected = [r"\.shard_\d+\.(weight|scale)$"]
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        memory_paths: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        r"""
        memory_paths (`torch.LongTensor` of shape `(batch, levels)`, *optional*):
            Cluster of each sequence at every level, as [`MegamemForCausalLM.route`] gives it; -1 reads the generic
            block, which is the default.
        """
        if input_ids is None:
            raise ValueError("megamem models need input_ids: memory is addressed by token ids, not by embeddings")
        hidden_states = self.embed_tokens(input_ids)
        new = input_ids.shape[1]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(new, device=input_ids.device) + seen)[None]

        if isinstance(attention_mask, dict):  # prepared by generate() for compiled decoding
            causal_mask, padding = attention_mask["full_attention"], attention_mask.get("linear_attention")
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            padding = attention_mask[:, -new:] if attention_mask is not None and attention_mask.ndim == 2 else None
        tokens = input_ids + 1 if padding is None else (input_ids + 1) * padding.to(input_ids.dtype)

        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                tokens=tokens,
                token_fold=self.token_fold,
                memory_paths=memory_paths,
                past_key_values=past_key_values,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class MegamemForCausalLM(MegamemPreTrainedModel, GenerationMixin):
    """Language model; ``generate`` hands ``memory_paths`` on to every step.

    A sequence is one document. Engram starts afresh after every end-of-document token; attention is kept apart where
    ``position_ids`` start again, as in training, for packed documents without a cache and without an attention mask.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MegamemConfig):
        super().__init__(config)
        self.model = MegamemModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.memory_router = MegamemMemoryRouter(config) if config.router_dimensions else None
        self.post_init()

    @torch.no_grad()
    def route(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> torch.LongTensor:
        """`memory_paths` `(batch, levels)` of prompts `(batch, sequence)`, for `forward` and `generate`."""
        if self.memory_router is None:
            raise ValueError("this model stores no router; pass memory_paths, or leave it out for the generic memory")
        if attention_mask is not None:
            input_ids = torch.where(attention_mask.bool(), input_ids, self.config.eos_token_id)
        return self.memory_router(input_ids)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        memory_paths: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        r"""
        memory_paths (`torch.LongTensor` of shape `(batch, levels)`, *optional*):
            Cluster of each sequence at every level, as [`route`] gives it; -1 reads the generic block, the default.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            memory_paths=memory_paths,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["MegamemForCausalLM", "MegamemModel", "MegamemPreTrainedModel"]
