"""A GPU's kernels, told apart by the names seen in profiles of an H200."""

import jax.numpy as jnp
import pytest

from experiments import kernels

PRODUCTS = ['nvjet_sm90_tst_128x160_64x5_2x1_v_bz_TNT', 'gemm_fusion_dot_122',
            'cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3',
            'void cudnn::fusion::compute_dot_do_o_specialized<true, 4>(void const*)',
            'void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>',
            'grouped_rows', 'grouped_matrices']
OTHERS = ['input_add_reduce_fusion', 'loop_convert_multiply_fusion_11', 'memcpy128',
          'input_scatter_fusion_36', 'wrapped_transpose', 'command_buffer']


def test_products_and_others():
  found = kernels.add_up([(name, 3.0) for name in PRODUCTS] + [(name, 1.5) for name in OTHERS])
  assert kernels.STEPS == 3
  assert found == pytest.approx({'products': 7.0, 'other': 3.0, 'launched': 13 / 3})


def test_off_a_gpu_nothing_is_profiled():
  assert kernels.per_step(lambda: jnp.ones(()) + 1) is None
