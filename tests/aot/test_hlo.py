"""The text of HLO modules: shapes, memory spaces, long lines, trip counts."""

import pytest

from bam_jax.aot import hlo

MODULE = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "step.py"

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %one = s32[]{:T(128)} constant(3)
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  %copied = s32[]{:T(128)S(6)} copy(%count)
  %next = s32[]{:T(128)} add(%copied, %one)
  %value = f32[8]{0:T(128)S(1)} get-tuple-element(%state), index=1
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%next, %value)
}

%condition (state.1: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(11)
  %state.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %test = pred[]{:T(512)} compare(%count.1, %limit), direction=LT
}

ENTRY %main.1_spmd (p: f32[8], q: bf16[4,2,16]) -> (f32[8], /*index=1*/bf16[4,2,16]) {
  %p = f32[8]{0:T(128)} parameter(0), metadata={op_name="x[\\'a\\']"}
  %q = bf16[4,2,16]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(1)
  %tuple.9 = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) while(%tuple.9), condition=%condition, body=%body
  %kernel = (bf16[4,2,16]{2,1,0:T(8,128)(2,1)}, f32[]{:T(128)}) \
custom-call(%q, /*index=1*/%p), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(step)/kernel"}
  %value.1 = f32[8]{0:T(128)S(1)} get-tuple-element(%loop), index=1
  %moved = bf16[4,2,16]{2,1,0:T(8,128)(2,1)} get-tuple-element(%kernel), index=0
  ROOT %result = (f32[8]{0:T(128)S(1)}, /*index=1*/bf16[4,2,16]{2,1,0}) tuple(%value.1, %moved)
}
"""


def test_a_module():
  x = hlo.parse(MODULE)
  assert hlo.root(x).name == 'result' and [*x][:2] == ['p', 'q']
  assert x['kernel'].target == 'tpu_custom_call' and x['kernel'].source == 'jit(step)/kernel'
  assert x['kernel'].operands == [x['q'], x['p']] and len(x['kernel'].arrays) == 2
  assert x['kernel'].arrays[0] == hlo.Array('bf16', (4, 2, 16))
  assert x['kernel'].arrays[0].bytes == 256
  assert x['value.1'].arrays[0].memory_space == 1
  assert hlo.root(x['loop'].calls['body'][0]).name == 'out'
  assert x['p'].users == [x['tuple.9'], x['kernel']]


@pytest.mark.parametrize('old, new', [
  ('direction=LT', 'direction=NE'), ('add(%copied, %one)', 'add(%copied, %copied)'),
  ('%limit = s32[]{:T(128)} constant(11)', '%limit = s32[]{:T(128)} iota()'),
  ('tuple(%zero, %p)', 'fusion(%zero, %p)'),
])  # fmt: skip
def test_trips_follow_start_step_and_limit_or_are_not_known(old, new):
  assert hlo.trip_count(hlo.parse(MODULE)['loop']) == len(range(1, 11, 3))
  assert old in MODULE
  assert hlo.trip_count(hlo.parse(MODULE.replace(old, new))['loop']) is None
