"""Compares checkpoints on held-out text: perplexity and bits per byte by domain, and their routers.

    python -m bam_jax.evaluate --checkpoint=runs/mine/seed --checkpoint=runs/mine/bam_kv \\
        --data=runs/mine/data
    python -m bam_jax.evaluate --checkpoint=DIR --data=law=acts.jsonl --data=code=py/ --stride=512
    python -m bam_jax.evaluate --checkpoint=runs/mine/btx --checkpoint=runs/mine/bam_kv \\
        --data=runs/mine/data --routing=routers/
    python -m bam_jax.evaluate --checkpoint=DIR --tasks=arc_easy,questions.jsonl --max_documents=100

Each token of a document but its BOS is scored once, its EOS included; docs/evaluate.md says how.
Scores do not depend on --batch_size, --mesh or --routing, to the last bit. Tables go to standard
error; `--json` writes `data`, `split`, `dtype`, `mesh`, `confidence`, `resamples`, `seed`,
`domains`, `notes`, `routing_page` (or null), and `rows`, one object a checkpoint, in order:
  label, checkpoint, run, step, method, tokenizer_hash: which it is.
  window, stride: tokens that are read at once, and from one window to the next.
  domains (by name), overall: `documents`, `tokens`, `bytes`, `nll` (a sum, nats), and
    `nats_per_token`, `perplexity`, `bits_per_byte`, each with `value`, `low` and `high`, its
    interval by bootstrap over documents (null where a domain has a single one); `difference`: the
    same three less the first row's (null in the first row; of checkpoints with another tokenizer
    `bits_per_byte` alone).
  experts: by router, where its experts come from.
  routing: null without --routing or routers; by router and domain `gate`, `load` [layer][expert],
    `entropy` [layer] of the gates, nats, and `own_share` [layer], the load of the experts that the
    domain's specialist became (null without one).

With `--tasks` in place of `--data` it writes `tasks`, `dtype`, `mesh`, `few_shot`, `max_documents`,
and `rows`, one object a checkpoint: checkpoint, run, step, method, tokenizer_hash, window, and
  tasks: by name `few_shot`, `questions`, and `metrics`, each with `value` and `stderr` (or null);
    after the first checkpoint's also `difference` from it, with `difference_stderr`.
  groups: by name the metrics over all of a group's questions.
"""

from typing import Any

import jax
from absl import flags

from bam_jax import cli
from bam_jax.errors import UserError
from bam_jax.evaluate import comparison, corpus, session
from bam_jax.tasks import session as tasks_session

_CHECKPOINT = flags.DEFINE_multi_string(
  'checkpoint', [], 'A run, one of its steps, or a conversion; may be repeated.'
)
_DATA = flags.DEFINE_multi_string(
  'data', [], 'A prepared folder, or DOMAIN=PATH of text, jsonl or parquet; may be repeated.'
)
_SPLIT = flags.DEFINE_string('split', 'valid', 'Split of prepared folders, and of marked files.')
_TEXT_FIELD = flags.DEFINE_string('text_field', 'text', 'JSON field or Parquet column of the text.')
_MAX_DOCUMENTS = flags.DEFINE_integer(
  'max_documents', None, 'The first documents of each domain, or of each task.', lower_bound=1
)
_WINDOW = flags.DEFINE_integer(
  'window', None, 'Tokens read at once; default: the length trained at.', lower_bound=1
)
_STRIDE = flags.DEFINE_integer(
  'stride', None, 'Tokens from one window to the next; default: the window.', lower_bound=1
)
_BATCH = flags.DEFINE_integer('batch_size', 16, 'Windows on the devices at once.', lower_bound=1)
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16'], 'Default: float32 on CPU, bfloat16 elsewhere.'
)
_MESH = flags.DEFINE_list('mesh', [], 'Devices along axes: data=2,fsdp=4.')
_RESAMPLES = flags.DEFINE_integer('resamples', 1000, 'Resamples of the bootstrap.', 1, 10**6)
_CONFIDENCE = flags.DEFINE_float('confidence', 0.95, 'Level of the intervals.', 0.0, 1.0)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the bootstrap, or of sampling.', lower_bound=0)
_ROUTING = flags.DEFINE_string('routing', None, 'Folder for pictures and a page of the routers.')

_TASKS = flags.DEFINE_list('tasks', [], 'In place of --data: tasks of lm-eval, .jsonl files.')
_FEW_SHOT = flags.DEFINE_integer(
  'few_shot', None, 'Solved questions before each one; default: as each task says.', 0, 1000
)
_ALLOW = flags.DEFINE_bool(
  'allow_generated_code', False, 'Tasks may run programs that the model writes, within limits.'
)


def main() -> dict[str, Any]:
  """Compares what the flags ask for, and prints it."""
  shared = {
    'dtype': _DTYPE.value or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16'),
    'mesh': cli.parse_mesh(_MESH.value),
    'batch_size': _BATCH.value,
    'window': _WINDOW.value,
    'seed': _SEED.value,
  }
  if _TASKS.value:
    _refuse('with --tasks', _DATA, _SPLIT, _TEXT_FIELD, _STRIDE, _RESAMPLES, _CONFIDENCE, _ROUTING)
    options = tasks_session.Options(
      **shared,
      few_shot=_FEW_SHOT.value,
      max_documents=_MAX_DOCUMENTS.value,
      allow_generated_code=_ALLOW.value,
    )
    return tasks_session.run(_CHECKPOINT.value, _TASKS.value, options)
  _refuse('without --tasks', _FEW_SHOT, _ALLOW)
  domains = corpus.read(_DATA.value, _SPLIT.value, _TEXT_FIELD.value, _MAX_DOCUMENTS.value)
  options = comparison.Options(
    **shared, stride=_STRIDE.value, resamples=_RESAMPLES.value, confidence=_CONFIDENCE.value
  )
  facts = session.run(_CHECKPOINT.value, domains, options, _ROUTING.value)
  return {'data': _DATA.value, 'split': _SPLIT.value} | facts


def _refuse(where: str, *unread: flags.FlagHolder) -> None:
  given = next((flag.name for flag in unread if flag.present), None)
  if given:
    raise UserError(f'--{given} has no effect {where}: leave it out.')


if __name__ == '__main__':
  cli.run(main)
