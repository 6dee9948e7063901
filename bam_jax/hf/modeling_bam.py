"""BAM for transformers: mixtures of attention and FFN experts; arXiv 2408.08274.

A block is parallel, `y = norm(x); x + attention(y) + ffn(y)`, either part dense or a mixture. Every
token passes through all the attention experts, whose outputs are weighted with the gates of the
query's token; of the FFN experts a token visits its top k. No balancing loss is added in training:
who fine-tunes the routers adds one.

Shapes: B batch, T queries, S keys, D model, H query heads, G key-value heads, K head, E experts.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_bam import BamConfig

# Releases before 5.24 call the cache `past_key_values`, later ones `cache`; each knows its own name
# in what it generates with, in outputs, and where it leaves the cache out to recompute.
FIELDS = [field.name for field in dataclasses.fields(CausalLMOutputWithPast)]
CACHE = 'cache' if 'cache' in FIELDS else 'past_key_values'


class BamLayerNorm(nn.Module):
  """Normalises the last axis, with a scale and no bias; computed in float32."""

  def __init__(self, *shape: int, eps: float):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(shape))
    self.eps = eps

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight.float()
    return normed.to(x.dtype)


class BamRotaryEmbedding(nn.Module):
  """Cosines and sines (B, 1, T, K/2) of the angles by which positions turn pairs of channels."""

  def __init__(self, config: BamConfig):
    super().__init__()
    self.theta, self.head_dim = config.rope_theta, config.head_dim

  def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    channels = torch.arange(0, self.head_dim, 2, device=position_ids.device).float()
    angles = position_ids[:, None, :, None].float() * self.theta ** (-channels / self.head_dim)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
  """Turns neighbouring channels of (B, heads, T, K) by their positions' angles, in float32."""
  even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
  turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
  return turned.flatten(-2).to(x.dtype)


class BamRouter(nn.Linear):
  """Gates (B, T, E) of the experts: a softmax over all of them, 0 for those that are not chosen."""

  def __init__(
    self, hidden_size: int, num_experts: int, top_k: int, renormalize: bool, biased: bool = False
  ):
    super().__init__(hidden_size, num_experts, bias=False)
    self.top_k, self.renormalize = top_k, renormalize
    # It counts in choosing experts and not in their gates.
    self.register_buffer('e_score_correction_bias', torch.zeros(num_experts) if biased else None)

  def forward(self, y: torch.Tensor) -> torch.Tensor:
    gates = F.linear(y.float(), self.weight.float()).softmax(-1)
    if not self.top_k:
      return gates
    scores = gates.detach()
    if self.e_score_correction_bias is not None:
      scores = scores + self.e_score_correction_bias.float()
    # Stable, so that ties go to the lower expert.
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
    gates = torch.zeros_like(gates).scatter(-1, chosen, gates.gather(-1, chosen))
    return gates / gates.sum(-1, keepdim=True) if self.renormalize else gates


class BamHeads(nn.Module):
  """Projections of attention: those of queries and outputs, those of keys and values, or all."""

  def __init__(self, config: BamConfig, query_output: bool, key_value: bool):
    super().__init__()
    D, K, eps = config.hidden_size, config.head_dim, config.layer_norm_eps
    self.head_dim = K
    if query_output:
      H = config.num_attention_heads
      self.q_proj = nn.Linear(D, H * K, bias=False)
      self.o_proj = nn.Linear(H * K, D, bias=False)
      self.q_norm = BamLayerNorm(H, K, eps=eps) if config.use_qk_norm else nn.Identity()
    if key_value:
      G = config.num_key_value_heads
      self.k_proj = nn.Linear(D, G * K, bias=False)
      self.v_proj = nn.Linear(D, G * K, bias=False)
      self.k_norm = BamLayerNorm(G, K, eps=eps) if config.use_qk_norm else nn.Identity()

  def query(self, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turned queries (B, H, T, K)."""
    return rotate(self.q_norm(self._split(self.q_proj(y))).transpose(1, 2), cos, sin)

  def key(self, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turned keys (B, G, T, K)."""
    return rotate(self.k_norm(self._split(self.k_proj(y))).transpose(1, 2), cos, sin)

  def value(self, y: torch.Tensor) -> torch.Tensor:
    """Values (B, G, T, K)."""
    return self._split(self.v_proj(y)).transpose(1, 2)

  def output(self, heads: torch.Tensor) -> torch.Tensor:
    """Heads (B, H, T, K) into the residual stream (B, T, D)."""
    return self.o_proj(heads.transpose(1, 2).flatten(-2))

  def _split(self, x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, self.head_dim))


class BamAttention(BamHeads):
  """One attention, or the sum of several experts' weighted with the gates of the query's token.

  Experts own their queries and outputs and, without `shared_kv`, their keys and values. The heads
  of all the experts lie side by side, in one call of the kernel and in one entry of the cache.
  """

  def __init__(self, config: BamConfig, layer_idx: int):
    E, shared_kv = config.num_attention_experts, config.shared_kv
    super().__init__(config, query_output=not E, key_value=not E or shared_kv)
    self.layer_idx = layer_idx
    self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    self.shared_kv = shared_kv
    self.experts = nn.ModuleList(BamHeads(config, True, not shared_kv) for _ in range(E))
    if E:
      self.router = BamRouter(
        config.hidden_size, E, config.num_attention_experts_per_tok, config.norm_topk_attention
      )

  def forward(
    self,
    y: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    cache: DynamicCache | None,
  ) -> torch.Tensor:
    queriers = self.experts or [self]
    keepers = [self] if self.shared_kv else queriers
    query = torch.cat([expert.query(y, *rotary) for expert in queriers], dim=1)
    key = torch.cat([expert.key(y, *rotary) for expert in keepers], dim=1)
    value = torch.cat([expert.value(y) for expert in keepers], dim=1)
    if cache is not None:
      key, value = cache.update(key, value, self.layer_idx)

    # A key-value head for every query head: each of a group's, and an expert's after the other's.
    repeats = 1, len(queriers) // len(keepers), 1, 1
    key = key.repeat_interleave(self.num_key_value_groups, dim=1).repeat(repeats)
    value = value.repeat_interleave(self.num_key_value_groups, dim=1).repeat(repeats)
    heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if not self.experts:
      return self.output(heads)
    gates = self.router(y).to(y.dtype).transpose(1, 2)[:, :, None, :, None]  # (B, E, 1, T, 1)
    heads = heads.unflatten(1, (len(queriers), -1))  # (B, E, H, T, K)
    return sum(expert.output(gates[:, e] * heads[:, e]) for e, expert in enumerate(self.experts))


class BamMLP(nn.Module):
  """SwiGLU: one FFN expert, or a dense FFN."""

  def __init__(self, config: BamConfig):
    super().__init__()
    self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
    self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
    self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

  def forward(self, y: torch.Tensor) -> torch.Tensor:
    return self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class BamSparseMLP(nn.Module):
  """The sum of the top-k FFN experts of each token, weighted with their gates."""

  def __init__(self, config: BamConfig):
    super().__init__()
    E = config.num_experts
    self.router = BamRouter(
      config.hidden_size, E, config.num_experts_per_tok, config.norm_topk_prob,
      config.use_expert_bias,
    )  # fmt: skip
    self.experts = nn.ModuleList(BamMLP(config) for _ in range(E))

  def forward(self, y: torch.Tensor) -> torch.Tensor:
    gates = self.router(y).to(y.dtype).flatten(0, 1)
    tokens = y.flatten(0, 1)
    output = torch.zeros_like(tokens)
    for e, expert in enumerate(self.experts):
      rows = gates[:, e].nonzero()[:, 0]
      output = output.index_add(0, rows, gates[rows, e, None] * expert(tokens[rows]))
    return output.view_as(y)


class BamDecoderLayer(GradientCheckpointingLayer):
  """One norm, then attention and FFN side by side."""

  def __init__(self, config: BamConfig, layer_idx: int):
    super().__init__()
    self.input_layernorm = BamLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    self.self_attn = BamAttention(config, layer_idx)
    self.mlp = BamSparseMLP(config) if config.num_experts else BamMLP(config)

  def forward(
    self,
    x: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    **cache: DynamicCache | None,
  ) -> torch.Tensor:
    y = self.input_layernorm(x)
    return x + self.self_attn(y, rotary, mask, cache[CACHE]) + self.mlp(y)


class BamPreTrainedModel(PreTrainedModel):
  config_class = BamConfig
  base_model_prefix = 'model'
  supports_gradient_checkpointing = True
  _no_split_modules = ['BamDecoderLayer']
  _skip_keys_device_placement = [CACHE]
  _keep_in_fp32_modules_strict = ['router']
  _supports_sdpa = True


class BamModel(BamPreTrainedModel):
  """Embedding, blocks and the final norm."""

  def __init__(self, config: BamConfig):
    super().__init__(config)
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    self.layers = nn.ModuleList(BamDecoderLayer(config, n) for n in range(config.num_hidden_layers))
    self.norm = BamLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    self.rotary_emb = BamRotaryEmbedding(config)
    self.gradient_checkpointing = False
    self.post_init()

  @can_return_tuple
  def forward(
    self,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    past_key_values: DynamicCache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    cache: DynamicCache | None = None,
    **kwargs,
  ) -> BaseModelOutputWithPast:
    """Hidden states after the final norm.

    Args:
      input_ids: (B, T); or give `inputs_embeds` (B, T, D).
      attention_mask: (B, S), 0 at padding, on either side; the cache's tokens included.
      position_ids: (B, T); default: on from the cache.
      past_key_values: keys and values of the tokens before these; `cache` is another name of it.
    """
    x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    use_cache = self.config.use_cache if use_cache is None else use_cache
    cache = past_key_values if cache is None else cache
    if use_cache and cache is None:
      cache = DynamicCache()
    past = cache.get_seq_length() if cache is not None else 0
    if position_ids is None:
      position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
    mask = causal_mask(past, x.shape[1], attention_mask, x.device)
    rotary = self.rotary_emb(position_ids)
    streams = []
    for layer in self.layers:
      streams.append(x)
      x = layer(x, rotary, mask, **{CACHE: cache})
    x = self.norm(x)
    return BaseModelOutputWithPast(
      last_hidden_state=x,
      hidden_states=(*streams, x) if output_hidden_states else None,
      **{CACHE: cache if use_cache else None},
    )


def causal_mask(
  past: int, length: int, attention_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
  """Which keys (S = past + length) a query sees: (B or 1, 1, T, S), bool."""
  keys = torch.arange(past + length, device=device)
  queries = keys[past:, None]
  mask = (keys <= queries)[None, None]
  if attention_mask is not None:
    # Padding sees itself: the softmax over nothing is not a number.
    mask = mask & attention_mask[:, None, None, :].bool() | (keys == queries)
  return mask


class BamForCausalLM(BamPreTrainedModel, GenerationMixin):
  """The model with its scores of the next token."""

  _tied_weights_keys = {'lm_head.weight': 'model.embed_tokens.weight'}

  def __init__(self, config: BamConfig):
    super().__init__(config)
    self.model = BamModel(config)
    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  @can_return_tuple
  def forward(
    self,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    past_key_values: DynamicCache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.LongTensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    cache: DynamicCache | None = None,
    **kwargs,
  ) -> CausalLMOutputWithPast:
    """Logits (B, T, V), and the mean loss of `labels` (B, T), which are shifted here; -100 is none.

    Args:
      logits_to_keep: of how many last tokens, or of which, to compute logits; 0 is all. The other
        arguments are those of `BamModel`.
    """
    outputs = self.model(
      input_ids,
      attention_mask,
      position_ids,
      past_key_values,
      inputs_embeds,
      use_cache,
      output_hidden_states,
      cache,
    )
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = self.config.logit_scale * self.lm_head(outputs.last_hidden_state[:, kept])
    loss = None
    if labels is not None:
      loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
    return CausalLMOutputWithPast(
      loss=loss,
      logits=logits,
      hidden_states=outputs.hidden_states,
      **{CACHE: outputs.get(CACHE)},
    )
