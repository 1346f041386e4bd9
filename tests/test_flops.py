"""Analytic FLOPs against XLA's own count, and parameter counts against hand counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moejax import flops, models, trees
from moejax.config import ConfigError
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig

B, L, M = 2, 64, 48
MOE = MoEConfig(layers='1', num_experts=4, capacity_factor=1.5)
TOP_K = dataclasses.replace(MOE, router='top_k', capacity_factor=2.0)
# Large enough that matmuls dominate, and no two sizes alike, so that no mistake cancels another.
T5 = t5.T5Config(d_model=256, d_ff=640, d_kv=48, num_heads=4, vocab_size=1024, encoder_layers=2,
                 decoder_layers=2)
VIT = vit.ViTConfig(image_size=64, patch_size=8, channels=3, d_model=256, d_ff=640, num_heads=4,
                    num_layers=2, num_classes=100)
CONFIGS = {
    't5': T5,
    't5 gather': dataclasses.replace(T5, encoder_moe=MOE, decoder_moe=TOP_K),
    't5 einsum': dataclasses.replace(
        T5, encoder_moe=dataclasses.replace(MOE, dispatch='einsum', group_size=2 * L),
        decoder_moe=dataclasses.replace(TOP_K, dispatch='einsum')),
    'vit': VIT,
    'vit gather': dataclasses.replace(VIT, head='cls', moe=MOE),
    'vit norm': dataclasses.replace(VIT, num_layers=1, moe=dataclasses.replace(
        TOP_K, layers='0', router='norm', granularity=2, shared_experts=3)),
}


def batch_of(config):
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
  if config.family == 'vit':
    images = (B, config.image_size, config.image_size, config.channels)
    return {'image': jax.ShapeDtypeStruct(images, jnp.float32), 'weight': shape(B)}
  return {'encoder_input': shape(B, L), 'decoder_input': shape(B, M), 'weight': shape(B, M)}


def xla_flops(function, *args) -> float:
  return jax.jit(function).lower(*args).compile().cost_analysis()['flops']


@pytest.mark.parametrize('name', CONFIGS)
def test_within_3_percent_of_xla(name):
  config = CONFIGS[name]
  model, batch = models.build(config), batch_of(config)
  lengths = () if config.family == 'vit' else (L, M)
  forward = lambda params, batch: model.apply(params, batch, train=True)[0]
  loss = lambda params, batch: jax.nn.logsumexp(forward(params, batch), axis=-1).mean()
  found = xla_flops(forward, model.shapes, batch)
  assert flops.forward_flops(config, B, *lengths) == pytest.approx(found, rel=0.03)
  found = xla_flops(jax.grad(loss), model.shapes, batch)
  assert flops.train_step_flops(config, B, *lengths) == pytest.approx(found, rel=0.03)


def test_a_t5_has_no_length_of_its_own():
  sparse = t5.config('tiny', encoder_moe=MoEConfig(layers='0', num_experts=2, group_size=8))
  for of in (flops.forward_flops, flops.train_step_flops):
    with pytest.raises(ConfigError, match='encoder_length: got 0'):
      of(sparse, 2)
    with pytest.raises(ConfigError, match='decoder_length: got 0'):
      of(sparse, 2, 8)
  with pytest.raises(ConfigError, match='model.encoder_moe.group_size: got 8, allowed: 0 without'):
    models.examples_per_group(sparse)


def test_forward_of_a_tiny_vit_by_hand():
  # B=3 images of 2x2 patches: patches 2*12*4*5, head 2*3*5*7; a block: q, k, v, o 4 * 2*12*5*5,
  # logits and values 2 * 2*3*4*4*5, MLP 2 * 2*12*5*11.
  config = vit.ViTConfig(image_size=4, patch_size=2, channels=1, num_classes=7, d_model=5, d_ff=11,
                         num_heads=1, num_layers=2)
  block = 4 * 600 + 2 * 480 + 2 * 1320
  assert flops.forward_flops(config, 3) == 480 + 2 * block + 210
  # MoE in block 1: groups of 4 tokens, E=2, C = round(1.0 * 4/2) = 2, so 3*2*2 slots as many as
  # tokens; router 2*12*5*2. At eval C = 4, twice the slots.
  config = dataclasses.replace(config, moe=MoEConfig(
      layers='1', num_experts=2, capacity_factor=1.0, eval_capacity_factor=2.0))
  assert flops.forward_flops(config, 3) == 480 + 2 * block + 210 + 240
  assert flops.forward_flops(config, 3, train=False) == 480 + 2 * block + 210 + 240 + 2640
  assert flops.train_step_flops(config, 3) == 3 * (480 + 2 * block + 210 + 240)


D, F, S = 5, 12, 4   # of the ViT below: B=3 images of 4 tokens
MLP = 2 * 2 * D * F  # FLOPs of a token: two matrices


@pytest.mark.parametrize('settings, per_token, at_eval', [
  # Router 2*5*E, and k (or c) MLPs; E = 4.
  (dict(router='top_k', k=2), 40 + 2 * MLP, 40 + 4 * MLP),            # capacity 2, 4 in evaluation
  (dict(router='top_k', k=3, dispatch='grouped'), 40 + 3 * MLP, 40 + 3 * MLP),      # no capacity
  (dict(router='top_p', k=3, dispatch='grouped'), 40 + 3 * MLP, 40 + 3 * MLP),      # the most
  (dict(dispatch='grouped'), 40 + 2 * MLP, 40 + 4 * MLP),             # expert choice has one
  (dict(dispatch='einsum'), 40 + 2 * MLP + 4 * 8 * D, 40 + 4 * MLP + 4 * 16 * D),   # slots: 8, 16
  (dict(router='top_k', granularity=3), 40 + 2 * MLP // 3, 40 + 4 * MLP // 3),
  (dict(shared_experts=2), 40 + 4 * MLP, 40 + 6 * MLP),
  (dict(router='top_k', k=3, granularity=3, shared_experts=2, dispatch='grouped'),
   40 + 5 * MLP // 3, 40 + 5 * MLP // 3),
  # Every expert on every token instead of a router.
  (dict(router='norm', dispatch='grouped'), 4 * MLP + 2 * MLP, 4 * MLP + 2 * MLP),
  (dict(router='norm', granularity=2), 6 * MLP // 2, 8 * MLP // 2),
  # A second matmul for the scale of the noise, which there is none of in evaluation.
  (dict(router='top_k', learned_noise=True), 80 + 2 * MLP, 40 + 4 * MLP),
  (dict(router='top_k', noise_std=1.0, bias_rate=0.1), 40 + 2 * MLP, 40 + 4 * MLP),
], ids=str)
def test_moe_layers_of_a_tiny_vit_by_hand(settings, per_token, at_eval):
  config = vit.ViTConfig(image_size=4, patch_size=2, channels=1, num_classes=7, d_model=D, d_ff=F,
                         num_heads=1, num_layers=1)
  sparse = dataclasses.replace(config, moe=MoEConfig(
      layers='0', num_experts=4, capacity_factor=2.0, eval_capacity_factor=4.0, **settings))
  for train, expected in ((True, per_token), (False, at_eval)):
    rest = flops.forward_flops(config, 3, train=train) - 3 * S * MLP
    assert flops.forward_flops(sparse, 3, train=train) == rest + 3 * S * expected


def test_what_a_utilisation_is_of_does_not_count_moving_tokens():
  config = dataclasses.replace(vit.config('tiny'), moe=MoEConfig(layers='1', num_experts=4))
  moved = dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch='einsum'))
  work = flops.train_step_flops(config, 3)
  assert flops.train_step_flops(moved, 3, dispatch=False) == work < flops.train_step_flops(moved, 3)


def test_parameters_of_fine_grained_and_shared_experts():
  # T5 tiny: D=16, d_ff=32. Of 6 experts of 8 units a token meets 3; two more it always meets.
  moe = MoEConfig(layers='1', num_experts=6, granularity=4, router='top_k', k=3, shared_experts=2,
                  learned_noise=True)
  of = lambda c: flops.parameters(models.build(c).shapes, c)
  dense = t5.config('tiny')
  total, _ = of(dense)
  rest = total - 3 * 16 * 32
  router, expert = 2 * 16 * 6, 3 * 16 * 8
  assert of(dataclasses.replace(dense, encoder_moe=moe)) == (
      rest + router + 8 * expert, rest + router + 5 * expert)


def test_parameters_count_total_and_active():
  dense = t5.config('tiny')
  sparse = dataclasses.replace(dense, encoder_moe=MOE, decoder_moe=TOP_K)
  of = lambda c: flops.parameters(models.build(c).shapes, c)
  mlp, router = 3 * 16 * 32, 16 * 4
  total, active = of(dense)
  assert total == active == trees.count(models.build(dense).shapes)
  # Each stack trades one MLP for four and a router; a token meets 1.5 (capacity) and 2 (k) of them.
  assert of(sparse) == (total + 2 * (3 * mlp + router), total + mlp // 2 + mlp + 2 * router)


def test_a_token_never_meets_more_experts_than_there_are():
  config = vit.config('tiny', moe=MoEConfig(layers='1', num_experts=1, capacity_factor=2.0))
  total, active = flops.parameters(models.build(config).shapes, config)
  assert total == active
