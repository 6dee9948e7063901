"""A recipe for timing, not for training: small models of one shape, dense and with 4 experts.

4 layers, d 256, 4 heads on 2 KV heads of 64, hidden 1024, vocabulary 8192, 4 sequences of 512.
`shapes.py:bfloat16` computes in that; the default is float32.
"""

from bam_jax import config

MIXTURES = ('btx', 'bam_shared_kv', 'bam_kv_experts')


def get_config(dtype: str = 'float32'):
  """Runs `dense`, `btx`, `bam_shared_kv`, `bam_kv_experts`, and `bam_routed`: shared KV, top-1."""
  common = {
    'data': {'text': 1.0},
    'tokens': 2048,
    'batch_size': 4,
    'schedule': {'peak_learning_rate': 1e-3, 'warmup_steps': 0},
    'compute': {'dtype': dtype},
  }
  runs = {'dense': {'label': 'dense', 'init': 'scratch', **common}}
  for name in ('two', 'three', 'four'):  # what a mixture of four needs
    runs[name] = {'label': name, 'init': {'run': 'dense'}, **common}
  for method in MIXTURES:
    upcycle = {'from': ['dense', 'two', 'three', 'four'], 'method': method}
    runs[method] = {'label': method, 'init': {'upcycle': upcycle}, **common}
  routed = upcycle | {'method': 'bam_shared_kv', 'attention_top_k': 1, 'router_input': 'prefix'}
  runs['bam_routed'] = {'label': 'bam_routed', 'init': {'upcycle': routed}, **common}
  return config.complete(
    {
      'name': 'shapes',
      'model': {
        'vocab_size': 8192,
        'd_model': 256,
        'num_layers': 4,
        'num_heads': 4,
        'num_kv_heads': 2,
        'head_dim': 64,
        'ffn_dim': 1024,
      },
      'data': {'path': 'none', 'sequence_length': 512},
      'runs': runs,
    }
  )
