"""The configuration of a BAM model for transformers."""

from transformers import CohereConfig


class BamConfig(CohereConfig):
  """What `BamForCausalLM` is built from: sizes as in CohereConfig, blocks and experts."""

  model_type = 'bam'
  base_model_tp_plan = None  # Cohere's does not know experts
  head_dim: int = 128
  # 'parallel_two_norms': attention and FFN each have a norm; 'sequential': the FFN reads the stream
  # after attention.
  block: str = 'parallel'
  norm: str = 'layernorm'  # 'layernorm_bias', 'rmsnorm', or 'rmsnorm_plus_one': times 1 + weight
  norm_place: str = 'pre'  # on a part's input; 'post': on its output, before the sum; 'both'
  qk_norm: str = 'none'  # 'head_layernorm', 'head_rms', or 'all_rms' over all heads of an expert
  biases: str = 'none'  # 'qkv', 'attention': of the output projections too, 'all': of the FFN too
  ffn: str = 'swiglu'  # 'geglu_tanh', or 'gelu': exact, without gate_proj
  rotary_layout: str = 'interleaved'  # pairs (2i, 2i + 1); 'half': (i, i + R) of 2R channels
  rotary_dim: int = 0  # channels of a head that are rotated, the first ones; 0: all
  layer_types: list[str] | None = None  # 'full_attention' or 'sliding_attention', for each layer
  sliding_window: int | None = None  # tokens that a token of a sliding layer sees, with itself
  window_rope_theta: float = 0.0  # of sliding layers, then unscaled; 0: as in others
  nope_layers: list[int] | tuple[int, ...] = ()  # numbers of layers without rotation
  attention_scale: float = 0.0  # factor of the scores; 0: 1 / sqrt(head_dim)
  embedding_scale: float = 1.0  # factor of the embedding
  residual_scale: float = 1.0  # factor of each part's output
  attention_cap: float = 0.0  # of scores: cap * tanh(score / cap); 0: none
  logit_cap: float = 0.0  # of scaled logits

  num_attention_experts: int = 4  # 0: a dense attention
  num_attention_experts_per_tok: int = 0  # attention experts for each token; 0: all of them
  attention_expert_ropes: list[dict] | tuple = ()  # of each, in place of rope_parameters
  norm_topk_attention: bool = False  # divide the gates of the chosen ones by their sum
  shared_kv: bool = False  # one key and one value projection for all attention experts
  num_experts: int = 4  # FFN experts; 0: a dense FFN
  num_experts_per_tok: int = 1  # FFN experts for each token
  norm_topk_prob: bool = False  # divide the gates of the chosen ones by their sum
  use_expert_bias: bool = False  # a bias in the choice of FFN experts, not in their gates
  router_input: str = 'token'  # what routers read; 'prefix': the mean of the tokens so far
  router_memory: int = 0  # in that mean a token n before has the weight (1 - 1 / m)^n; 0: 1
  capacity_factor: float = 0.0  # of the FFN experts in training; no token is dropped here

  def __post_init__(self, **kwargs):
    self.layer_types = self.layer_types or ['full_attention'] * self.num_hidden_layers
    super().__post_init__(**kwargs)
