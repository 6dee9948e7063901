"""The graph of the paper in a few seconds: for tests of `main` as a whole process."""

from ml_collections import ConfigDict

from bam_jax import config


def get_config(text: str = '') -> ConfigDict:
  """The recipe; `text` is a folder with one folder a domain."""
  common = dict(
    tokens=12 * 64,
    batch_size=4,
    schedule=dict(peak_learning_rate=1e-2, warmup_steps=2),
    intervals=dict(log=1, evaluate=5, checkpoint=3),
  )
  both = dict(general=0.5, code=0.5)

  def mixture(method):
    upcycle = {'from': ('seed', 'code'), 'method': method}
    return dict(label=method, init=dict(upcycle=upcycle), data=both, **common)

  return config.complete(
    dict(
      name='tiny',
      seed=3,
      data=dict(
        path='{workdir}/data', sequence_length=16, prepare=dict(input=text, train_tokenizer=300)
      ),
      model=dict(
        vocab_size=300, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        ffn_dim=24,
      ),
      evaluation=dict(batch_size=4, tokens=64),
      runs=dict(
        seed=dict(label='seed', init='scratch', data=both, **common),
        code=dict(
          label='code specialist', init=dict(run='seed'), data=dict(code=0.9, general=0.1),
          **common,
        ),
        btx=mixture('btx'),
        bam_shared_kv=mixture('bam_shared_kv'),
        bam_kv_experts=mixture('bam_kv_experts'),
      ),
    )
  )  # fmt: skip
