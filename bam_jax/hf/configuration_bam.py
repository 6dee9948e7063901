"""The configuration of a BAM model for transformers."""

from transformers import PretrainedConfig


class BamConfig(PretrainedConfig):
  """What `BamForCausalLM` is built from.

  Args:
    vocab_size: words.
    hidden_size: channels of the residual stream.
    intermediate_size: hidden channels of one FFN expert.
    num_hidden_layers: parallel blocks.
    num_attention_heads: query heads of one attention expert.
    num_key_value_heads: key-value heads of one attention expert.
    head_dim: channels of a head; default: hidden_size / num_attention_heads.
    max_position_embeddings: the length that the model was trained at.
    layer_norm_eps: of all norms.
    rope_theta: base of the rotary positions.
    logit_scale: what logits are multiplied by.
    use_qk_norm: whether queries and keys of a head are normalised.
    num_attention_experts: 0 is a dense attention.
    num_attention_experts_per_tok: attention experts that count for a token; 0 is all of them.
    norm_topk_attention: whether the gates of the chosen attention experts are divided by their sum.
    shared_kv: whether one key and one value projection serve all the attention experts.
    num_experts: FFN experts; 0 is a dense FFN.
    num_experts_per_tok: FFN experts that a token visits.
    norm_topk_prob: whether the gates of the chosen FFN experts are divided by their sum.
    use_expert_bias: whether a bias for each FFN expert counts in choosing them, not in their gates.
    expert_buffer_factor: room for tokens in an FFN expert in training; no token is dropped here.
    upcycling_method: how the model was made of dense ones.
    expert_sources: names of the dense models that the experts were.
    tie_word_embeddings: whether the output embedding is the input embedding.
  """

  model_type = 'bam'
  keys_to_ignore_at_inference = ['past_key_values', 'cache']  # before transformers 5.24, and since

  def __init__(
    self,
    vocab_size=256000,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=None,
    head_dim=None,
    max_position_embeddings=2048,
    layer_norm_eps=1e-5,
    rope_theta=10000.0,
    logit_scale=1.0,
    use_qk_norm=False,
    num_attention_experts=4,
    num_attention_experts_per_tok=0,
    norm_topk_attention=False,
    shared_kv=False,
    num_experts=4,
    num_experts_per_tok=1,
    norm_topk_prob=False,
    use_expert_bias=False,
    expert_buffer_factor=0.0,
    upcycling_method=None,
    expert_sources=(),
    initializer_range=0.02,
    use_cache=True,
    tie_word_embeddings=True,
    **kwargs,
  ):
    self.vocab_size = vocab_size
    self.hidden_size = hidden_size
    self.intermediate_size = intermediate_size
    self.num_hidden_layers = num_hidden_layers
    self.num_attention_heads = num_attention_heads
    self.num_key_value_heads = num_key_value_heads or num_attention_heads
    self.head_dim = head_dim or hidden_size // num_attention_heads
    self.max_position_embeddings = max_position_embeddings
    self.layer_norm_eps = layer_norm_eps
    self.rope_theta = rope_theta
    self.logit_scale = logit_scale
    self.use_qk_norm = use_qk_norm
    self.num_attention_experts = num_attention_experts
    self.num_attention_experts_per_tok = num_attention_experts_per_tok
    self.norm_topk_attention = norm_topk_attention
    self.shared_kv = shared_kv
    self.num_experts = num_experts
    self.num_experts_per_tok = num_experts_per_tok
    self.norm_topk_prob = norm_topk_prob
    self.use_expert_bias = use_expert_bias
    self.expert_buffer_factor = expert_buffer_factor
    self.upcycling_method = upcycling_method
    self.expert_sources = list(expert_sources)
    self.initializer_range = initializer_range
    self.use_cache = use_cache
    super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
