"""How far a checkpoint is from the first, question by question.

Both were asked the same: that one question is harder than another leaves the difference alone, so
its standard error is smaller than those of the two scores let one think.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Samples = Mapping[str, Sequence[Mapping[str, Any]]]  # lm-eval's, by task


def add(tasks: Mapping[str, Any], samples: Samples, first: Samples) -> None:
  """Adds `difference` to the metrics of a row's tasks, and `difference_stderr`.

  Both are None where a metric is no mean over the questions.

  Args:
    tasks: of a row of `--json`.
    samples: what its checkpoint answered.
    first: what the first checkpoint answered.
  """
  for name, facts in tasks.items():
    for metric, measure in facts['metrics'].items():
      ours, theirs = (_values(metric, some[name]) for some in (samples, first))
      known = ours and ours.keys() == theirs.keys()
      drawn = np.array([ours[n] - theirs[n] for n in ours] if known else [], np.float64)
      error = drawn.std(ddof=1) / math.sqrt(len(drawn)) if len(drawn) > 1 else None
      measure['difference'] = float(drawn.mean()) if known else None
      measure['difference_stderr'] = None if error is None else float(error)


def _values(metric: str, samples: Sequence[Mapping[str, Any]]) -> dict[int, float]:
  """A metric of each question, by its number; none where it has no number for each."""
  name, _, wanted = metric.partition(',')
  return {
    sample['doc_id']: float(sample[name])
    for sample in samples
    if sample['filter'] == (wanted or sample['filter'])
    and isinstance(sample.get(name), int | float)
  }
