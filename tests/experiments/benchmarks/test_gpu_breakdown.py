"""A GPU's kernels, told apart by the names seen in profiles of an H200."""

import jax.numpy as jnp
import pytest

from experiments.benchmarks import gpu_profile

PRODUCTS = ['nvjet_sm90_tst_128x160_64x5_2x1_v_bz_TNT', 'gemm_fusion_dot_122',
            'cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3',
            'void cudnn::fusion::compute_dot_do_o_specialized<true, 4>(void const*)',
            'void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>',
            'grouped_rows', 'grouped_matrices']
OTHERS = ['input_add_reduce_fusion', 'loop_convert_multiply_fusion_11', 'memcpy128',
          'input_scatter_fusion_36', 'wrapped_transpose', 'command_buffer']


def test_products_and_others():
  found = gpu_profile.add_up([(name, 3.0) for name in PRODUCTS] + [(name, 1.5) for name in OTHERS])
  dearest = found.pop('dearest')
  assert gpu_profile.STEPS == 3
  assert found == pytest.approx({'products': 7.0, 'other': 3.0, 'launched': 13 / 3})
  assert dearest == dict.fromkeys(OTHERS[:gpu_profile.DEAREST], 0.5)   # of as dear ones the first


def test_off_a_gpu_nothing_is_profiled():
  assert gpu_profile.per_step(lambda: jnp.ones(()) + 1) is None


def test_the_dearest_are_those_that_take_longest_in_all():
  often, once = [('small', 1.0)] * 4, [('large', 3.0)]
  many = [(f'tiny_{i}', 0.1) for i in range(9)]
  found = gpu_profile.add_up([*many, *once, *often, ('nvjet', 99.0)])['dearest']
  assert len(found) == gpu_profile.DEAREST and list(found)[:2] == ['small', 'large']
  assert found['small'] == pytest.approx(4 / 3) and found['large'] == pytest.approx(1.0)


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


def test_what_others_move_is_their_operands_and_results():
  """The fusion reads two arrays of 32 bfloat16 and writes one, the cast reads 32 and writes 32."""
  assert gpu_profile.moved(PROGRAM) == 3 * 64 + 64 + 128
