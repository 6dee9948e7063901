"""A small graph for jobs of several processes, on a mesh of the test's choice."""

from ml_collections import ConfigDict

from bam_jax import config


def get_config(argument: str) -> ConfigDict:
  """The recipe; `argument` is FOLDER,STEPS,MESH: of text, of each run, DATAxFSDPxEXPERTxTENSOR."""
  text, steps, sizes = argument.split(',')
  mesh = dict(zip(('data', 'fsdp', 'expert', 'tensor'), map(int, sizes.split('x'))))
  common = dict(
    tokens=int(steps) * 12 * 16,
    batch_size=12,
    schedule=dict(peak_learning_rate=1e-2, warmup_steps=2),
    intervals=dict(log=1, evaluate=20, checkpoint=10),
    mesh=mesh,
  )
  upcycle = {'from': ('seed', 'code'), 'method': 'bam_kv_experts', 'router_init': 'ridge'}
  return config.complete(
    dict(
      name='job',
      seed=3,
      data=dict(
        path='{workdir}/data', sequence_length=16, prepare=dict(input=text, train_tokenizer=300)
      ),
      model=dict(
        vocab_size=304, d_model=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4,
        ffn_dim=32,
      ),
      evaluation=dict(batch_size=12, tokens=64),
      runs=dict(
        seed=dict(label='seed', init='scratch', data=dict(general=0.5, code=0.5), **common),
        code=dict(
          label='code', init=dict(run='seed'), data=dict(code=0.9, general=0.1), **common
        ),
        bam=dict(
          label='BAM', init=dict(upcycle=upcycle), data=dict(general=0.5, code=0.5), **common
        ),
      ),
    )
  )  # fmt: skip
