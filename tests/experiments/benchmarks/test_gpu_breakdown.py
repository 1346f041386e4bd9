"""A step's matmuls and attentions beside its FLOPs, and a GPU's kernels by names of an H200."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import gpu_breakdown, gpu_step
from experiments.benchmarks.gpu_breakdown import Attention, Matmul
from moejax import flops


@pytest.mark.parametrize('scale', gpu_step.SCALES)
def test_the_operations_of_a_step_are_all_its_flops(scale):
  scale = gpu_step.SCALES[scale]
  for case in gpu_step.all_cases(scale):
    config = case.config(scale, 16)
    lengths = gpu_step._lengths(config) if config.model.family == 't5' else ()
    operations = gpu_breakdown.operations(config.model, 16, *lengths)
    assert sum(x.flops for x in operations) == flops.forward_flops(config.model, 16, *lengths)


@pytest.mark.parametrize('operation, shapes', [
    (Matmul(5, 3, 8, 16, 32), [(3, 8, 32), (3, 8, 16), (3, 16, 32)]),
    (Attention(5, 2, 6, 4, 3, 8, bias=True, mask=True),
     [(2, 6, 3, 8), (2, 6, 3, 8), (2, 4, 3, 8), (2, 4, 3, 8), (1, 3, 6, 4)]),
    (Attention(5, 2, 6, 6, 3, 8), [(2, 6, 3, 8)] * 4)])
@pytest.mark.parametrize('fused', [False, True])
def test_operations_are_timed_in_both_passes_as_often_as_they_occur(operation, shapes, fused,
                                                                    monkeypatch):
  seen, fused_calls = [], []
  real = gpu_breakdown.attention.fused
  monkeypatch.setattr(gpu_breakdown.attention, 'fused',
                      lambda *qkv: fused_calls.append(1) or real(*qkv))

  def per_call(call, **_):
    seen.extend(x.shape for x in jax.tree.leaves(call()))
    return [1.0, 2.0, 3.0]
  monkeypatch.setattr(gpu_breakdown, 'per_call', per_call)
  assert gpu_breakdown.seconds(operation, fused) == 5 * 2.0
  assert seen == shapes   # the value, and the gradient of each operand
  assert bool(fused_calls) == (
      fused and isinstance(operation, Attention) and not operation.bias)


def test_seconds_of_a_call_are_those_of_a_round_over_its_calls(clock):
  """A call takes 0.25 s, the first, which compiles, 10 s more: 4 calls a round of one second."""
  def call():
    clock.now += 0.25 if clock.calls else 10.25
    clock.calls.append('call')
    return 0.0
  assert gpu_breakdown.per_call(call, rounds=3, least=1.0) == [0.25] * 3
  assert len(clock.calls) == 1 + 1 + 3 * 4


def test_a_fused_kernel_that_is_wrong_shows(monkeypatch):
  operation = Attention(1, 2, 12, 12, 3, 8)
  assert gpu_breakdown.attention_errors(operation)['fused'] < 0.02
  real = gpu_breakdown.attention.fused
  for wrong in (lambda q, k, v: real(q, k, v[:, ::-1]),                        # in its output
                lambda q, k, v: real(jax.lax.stop_gradient(q), k, v)):         # in a gradient
    monkeypatch.setattr(gpu_breakdown.attention, 'fused', wrong)
    errors = gpu_breakdown.attention_errors(operation)
    assert errors['fused'] > 0.5 and errors['plain'] < 0.02


PRODUCTS = ['nvjet_sm90_tst_128x160_64x5_2x1_v_bz_TNT', 'gemm_fusion_dot_122',
            'cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3',
            'void cudnn::fusion::compute_dot_do_o_specialized<true, 4>(void const*)',
            'void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>',
            'grouped_rows', 'grouped_matrices']
OTHERS = ['input_add_reduce_fusion', 'loop_convert_multiply_fusion_11', 'memcpy128',
          'input_scatter_fusion_36', 'wrapped_transpose', 'command_buffer']


def test_kernels_are_products_or_others():
  total = gpu_breakdown.add_up(
      [(name, 3.0) for name in PRODUCTS] + [(name, 1.5) for name in OTHERS])
  longest = total.pop('longest')
  assert gpu_breakdown.STEPS == 3
  assert total == pytest.approx({'products': 7.0, 'other': 3.0, 'launched': 13 / 3})
  assert longest == dict.fromkeys(OTHERS[:gpu_breakdown.SHOWN], 0.5)   # among equals the first


def test_the_longest_kernels_are_those_that_take_longest_in_all():
  often, once = [('small', 1.0)] * 4, [('large', 3.0)]
  many = [(f'tiny_{i}', 0.1) for i in range(9)]
  longest = gpu_breakdown.add_up([*many, *once, *often, ('nvjet', 99.0)])['longest']
  assert len(longest) == gpu_breakdown.SHOWN and list(longest)[:2] == ['small', 'large']
  assert longest['small'] == pytest.approx(4 / 3) and longest['large'] == pytest.approx(1.0)


def test_off_a_gpu_nothing_is_profiled():
  assert gpu_breakdown.profile(lambda: jnp.ones(()) + 1) is None


PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_add (p.0: bf16[8,4], p.1: bf16[8,4]) -> bf16[8,4] {
  %p.0 = bf16[8,4]{1,0} parameter(0)
  %p.1 = bf16[8,4]{1,0} parameter(1)
  ROOT %add.1 = bf16[8,4]{1,0} add(%p.0, %p.1)
}

%fused_dot (p.2: bf16[8,16], p.3: bf16[16,4]) -> bf16[8,4] {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  %p.3 = bf16[16,4]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,4]{1,0} dot(%p.2, %p.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[8,16], w: bf16[16,4]) -> f32[8,4] {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,4]{1,0} parameter(1)
  %mm = bf16[8,4]{1,0} custom-call(%x, %w), custom_call_target="__cublas$lt$matmul"
  %gemm_fusion = bf16[8,4]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused_dot
  %loop_add_fusion = bf16[8,4]{1,0} fusion(%mm, %gemm_fusion), kind=kLoop, calls=%fused_add
  ROOT %wrapped_convert = f32[8,4]{1,0} convert(%loop_add_fusion)
}
"""


def test_bytes_that_others_move_are_their_operands_and_results():
  """The fusion reads two arrays of 32 bfloat16 and writes one, the cast reads 32 and writes 32."""
  assert gpu_breakdown.bytes_moved(PROGRAM) == 3 * 64 + 64 + 128
