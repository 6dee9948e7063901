"""Compares checkpoints on held-out text: perplexity and bits per byte by domain, and their routers.

    python -m bam_jax.evaluate --checkpoint=runs/mine/seed --checkpoint=runs/mine/bam_kv \\
        --data=runs/mine/data
    python -m bam_jax.evaluate --checkpoint=DIR --data=law=acts.jsonl --data=code=py/ --stride=512
    python -m bam_jax.evaluate --checkpoint=DIR --tasks=arc_easy,mine.yaml --max_documents=100

Every token of a document except BOS is scored once, EOS included; see docs/evaluate.md. Tables go
to standard error; `--json` writes `data`, `split`, `dtype`, `mesh`, `confidence`, `resamples`,
`seed`, `domains`, `notes`, and `rows`, one object a checkpoint, in order:
  label, checkpoint, run, step, method, tokenizer_hash: identity.
  window, stride: tokens read at once; tokens from one window's start to the next.
  domains (by name), overall: `documents`, `tokens`, `bytes`, `nll` (a sum, nats), and
    `nats_per_token`, `perplexity`, `bits_per_byte`, each with `value`, `low` and `high`, its
    interval by bootstrap over documents (null where a domain has a single one); `difference`: the
    same three minus the first row's (null in the first row; for checkpoints with another
    tokenizer only `bits_per_byte`).
  experts: by router, the source of each expert.
  routing: null without --routing or routers; by router and domain `gate`, `load` [layer][expert],
    `entropy` [layer] of the gates, nats, and `own_share` [layer], the load of the experts that the
    domain's specialist became (null without one).

With `--tasks` instead of `--data` it writes `tasks`, `dtype`, `mesh`, `few_shot`, `max_documents`,
and `rows`, one object a checkpoint: checkpoint, run, step, method, tokenizer_hash, window, and of
lm-eval's own results `results`, `groups`, `n-shot`, `n-samples` and `versions`.
"""

from typing import Any

import jax
from absl import flags

from bam_jax import cli
from bam_jax.config.strict import require
from bam_jax.evaluate import comparison, corpus, session
from bam_jax.tasks import session as tasks_session

_CHECKPOINT = flags.DEFINE_multi_string('checkpoint', [], 'A run, step, or output of convert.')
_DATA = flags.DEFINE_multi_string('data', [], 'A prepared dataset, or DOMAIN=PATH of text.')
_SPLIT = flags.DEFINE_string('split', 'valid', 'Split of prepared datasets and of files so named.')
_TEXT_FIELD = flags.DEFINE_string('text_field', 'text', 'JSON field or Parquet column of the text.')
flags.DEFINE_list('without', [], 'Experts to leave out of every checkpoint, by name or number.')
flags.DEFINE_integer('max_documents', None, 'Of each domain or task, whatever their lengths.', 1)
flags.DEFINE_integer('window', None, 'Tokens at once; default: the training length.', 1)
_STRIDE = flags.DEFINE_integer('stride', None, 'From window to window; default: the window.', 1)
flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Default: float32 only on CPU.')
flags.DEFINE_list('mesh', [], 'Devices along each axis: data=2,fsdp=4.')
_RESAMPLES = flags.DEFINE_integer('resamples', 1000, 'Resamples of the bootstrap.', 1, 10**6)
_CONFIDENCE = flags.DEFINE_float('confidence', 0.95, 'Level of the intervals.', 0.0, 1.0)
flags.DEFINE_integer('seed', 0, 'Seed of the bootstrap, or of sampling.', lower_bound=0)
_ROUTING = flags.DEFINE_string('routing', None, 'Folder for pictures of the routers.')

_TASKS = flags.DEFINE_list('tasks', [], 'Instead of --data: tasks of lm-eval, .yaml files.')
_BATCH = flags.DEFINE_integer('batch_size', 16, 'Tasks: texts generated at once.', lower_bound=1)
_FEW_SHOT = flags.DEFINE_integer('few_shot', None, "Solved examples; default: the task's.", 0, 1000)


def main() -> dict[str, Any]:
  """Compares the checkpoints that the flags name, and prints the tables."""
  values = {name: flags.FLAGS[name].value for name in comparison.Options._fields}
  default = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  values |= {'dtype': values['dtype'] or default, 'mesh': cli.parse_mesh(values['mesh'])}
  options = comparison.Options(**values)
  if _TASKS.value:
    _refuse('with --tasks', _DATA, _SPLIT, _TEXT_FIELD, _STRIDE, _RESAMPLES, _CONFIDENCE, _ROUTING)
    return tasks_session.run(_CHECKPOINT.value, _TASKS.value, options)
  _refuse('without --tasks', _BATCH, _FEW_SHOT)
  domains = corpus.read(_DATA.value, _SPLIT.value, _TEXT_FIELD.value, options.max_documents)
  facts = session.run(_CHECKPOINT.value, domains, options, _ROUTING.value)
  return {'data': _DATA.value, 'split': _SPLIT.value} | facts


def _refuse(where: str, *unread: flags.FlagHolder) -> None:
  for flag in unread:
    require(not flag.present, f'--{flag.name} has no effect {where}: remove it.')


if __name__ == '__main__':
  cli.run(main)
