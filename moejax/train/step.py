"""The train step: one pure function of (state, batch), however many devices run it.

Loss terms are ratios of sums over the whole global batch. Their denominators (token counts) do not
depend on parameters, so they are added over devices first; every device and microbatch then takes
the gradient of its numerators over the global denominators, and gradients simply add up.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax import tasks, trees
from moejax.train import optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """All that a checkpoint holds.

  Attributes:
    step: int32 scalar, the global step: a run that continues another counts on from it.
    params: nested dict of float32.
    opt_state: params' paths, each leaf replaced by its optimizer slots.
    key: uint32 key data; step n draws its noise from fold_in(key, n).
    window: sums of metrics since they were last logged, nested (see metrics.summarize); {} stands
      for none yet.
  """
  step: jax.Array
  params: dict
  opt_state: dict
  key: jax.Array
  window: dict

  def as_dict(self) -> dict:
    """Nested dict for a checkpoint; `TrainState(**d)` is the inverse."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def make_train_step(model, optimizer_config: optimizer.OptimizerConfig, learning_rate: Callable, *,
                    microbatches: int = 1, rows_per_group: int = 1,
                    reduce: Callable = lambda x: x) -> Callable:
  """Builds train_step(state, batch) -> (state, objective of this batch).

  Args:
    model: models.Model.
    optimizer_config: how gradients become updates.
    learning_rate: step -> float32.
    microbatches: the batch is worked through in this many parts, gradients added up.
    rows_per_group: examples that are routed together and must stay in one microbatch.
    reduce: adds a tree over devices (psum under pmap); the identity where arrays are global.
  """
  def objective(params, batch, key, tokens):
    """Numerators of this batch over global denominators `tokens`; and all sums."""
    logits, aux = model.apply(params, batch, train=True, key=key)
    sums = tasks.loss_sums(logits, batch)
    aux_loss = auxiliary_loss(aux, tokens)
    return sums['loss'] / tokens['loss'] + aux_loss, (sums, aux, aux_loss)

  def gradients(params, batch, key, tokens):
    (value, (sums, aux, aux_loss)), grads = jax.value_and_grad(objective, has_aux=True)(
        params, batch, key, tokens)
    aux = {path: {k: v for k, v in layer.items() if not k.endswith('_loss')}
           for path, layer in aux.items()}
    sums = {**sums, 'objective': value, 'aux_loss': aux_loss, 'layers': trees.unflatten(aux)}
    return grads, sums

  def train_step(state: TrainState, batch: dict) -> tuple[TrainState, jax.Array]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    tokens = reduce({'loss': batch['weight'].sum(), **model.token_counts(batch)})
    tokens = jax.tree.map(lambda n: jnp.maximum(n.astype(jnp.float32), 1), tokens)
    parts = split(batch, microbatches, rows_per_group)
    if microbatches == 1:
      total = gradients(state.params, parts[0], key, tokens)
    else:
      total = accumulate(lambda part: gradients(state.params, part, key, tokens), parts)
    grads, sums = reduce(total)
    grads, norm = optimizer.clip_by_global_norm(grads, optimizer_config.clip_norm)
    params, opt_state = optimizer.update(
        optimizer_config, grads, state.opt_state, state.params, learning_rate(state.step))
    sums = {**sums, 'grad_norm': norm, 'steps': jnp.float32(1)}
    add_router_norms(sums['layers'], grads)
    window = jax.tree.map(jnp.add, state.window, sums) if state.window else sums
    new = TrainState(state.step + 1, params, opt_state, state.key, window)
    return new, sums['objective']

  return train_step


def auxiliary_loss(aux: dict, tokens: dict) -> jax.Array:
  """Weighted router losses of a batch: means over real tokens, then over the layers that have it.

  Args:
    aux: {'<stack>/layers/<n>': sums of MoELayer}.
    tokens: global number of real tokens of each stack.
  """
  total = jnp.float32(0)
  for name in ('balance_loss', 'z_loss'):
    layers = [sums[name] / tokens[path.split('/')[0]] for path, sums in aux.items() if name in sums]
    if layers:
      total += sum(layers) / len(layers)
  return total


def split(batch: dict, parts: int, rows_per_group: int) -> list[dict] | dict:
  """Cuts a batch into microbatches without cutting a routing group or moving rows between devices.

  Consecutive groups go to the microbatches in turn, so each device's rows fall evenly into all of
  them, and groups are the same whatever `parts` is.

  Returns:
    [batch] for one part, else a dict of arrays with a leading axis of `parts`.
  """
  if parts == 1:
    return [batch]
  def cut(x):
    x = x.reshape(-1, parts, rows_per_group, *x.shape[1:])
    return x.swapaxes(0, 1).reshape(parts, -1, *x.shape[3:])
  return jax.tree.map(cut, batch)


def accumulate(fn: Callable, parts: dict):
  """Sum of fn(part) over the leading axis of parts, one part in memory at a time."""
  shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(
      lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None), zeros, parts)[0]


def add_router_norms(layers: dict, grads: dict) -> None:
  """Puts the L2 norm of each router's gradient, after clipping, into its layer's sums."""
  flat = trees.flatten(grads)
  for path, grad in flat.items():
    if path.endswith('/moe/router/kernel'):
      node = layers
      for name in path.removesuffix('/moe/router/kernel').split('/'):
        node = node[name]
      node['router_grad_norm'] = jnp.sqrt(jnp.sum(grad.astype(jnp.float32) ** 2))
