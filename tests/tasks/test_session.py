"""What is refused without lm-eval."""

import pytest

from bam_jax.errors import UserError
from bam_jax.evaluate import comparison
from bam_jax.tasks import session
from tests.hf import folders


def test_mistakes_are_refused_before_lm_eval_is_imported(tmp_path, monkeypatch):
  monkeypatch.setattr(session.importlib.util, 'find_spec', lambda name: None)
  model = folders.make_model()
  path = str(folders.write_checkpoint(tmp_path / 'model', model, folders.draw(model)))
  for checkpoints, task, sentence in (
    ([path], 'arc_easy', 'requires lm-eval, which is not installed: pip install'),
    ([], 'x', '--checkpoint=DIR is required'), ([path] * 2, 'x', 'twice'),
    ([path + '/no'], 'x', '/no'),
  ):  # fmt: skip
    with pytest.raises(UserError, match=sentence):
      session.run(checkpoints, [task], comparison.Options('float32'))
