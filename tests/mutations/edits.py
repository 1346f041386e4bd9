"""The traps, and the edits that put each of them into the code; see tests/mutations/__init__.py.

{trap: ((where, pattern, replacement, tests), ...)}:
- where: the function, class, constant or module, by the end of its dotted name ('top_k',
  'Reader.restore', 'dispatch.gather'), wherever its file is; or a package, for all its modules
  ('moejax.moe').
- pattern: text that occurs exactly once in what has that name, as `ast.unparse` writes it (one line
  a statement, no comments, single quotes). '$' stands for any text within a line, '@' for a name,
  with its dots.
- replacement: in which each '$' and '@' is what that of the pattern stood for, in their order.
- tests: arguments of pytest, below tests/; the part of the tests that has to notice.
"""

# What others fell into, and what each method invites: design section 5. None may go.
TRAPS = {
    'top-1 without router gradient': (
        ('_check_token_choice', 'not self.renormalize, ', 'True, ', 'moe/test_config.py'),
        ('top_k', 'weight = jnp.take_along_axis(scores, $',
         'weight = jax.lax.stop_gradient(jnp.take_along_axis(scores, $)',
         'moe/test_token_choice.py -k gradient')),
    'softmax twice in the balance loss': (
        ('load_balance', '[..., None], probs, ', '[..., None], jax.nn.softmax(probs), ',
         'moe/test_balance.py -k load_balance'),),
    'balance loss never added to the total': (
        ('make_train_step', 'return (task_objective + aux_loss, ', 'return (task_objective, ',
         'train/test_step.py'),
        ('moejax.moe', "_loss'] = loss_weight * value",
         "_loss'] = jax.lax.stop_gradient(loss_weight * value)", 'moe/test_layer.py -k auxiliary')),
    'padding counted in the balance loss': (
        ('moejax.moe', 'return (@ * @.valid[..., None]).sum((1, 2))', 'return @.sum((1, 2))',
         'moe/test_balance.py -k load_balance'),
        ('load_balance', 'jnp.where(mask[..., None], probs, 0.0)', 'probs',
         'moe/test_balance.py -k load_balance'),
        ('load_balance', 'jnp.maximum(mask.sum(1), 1)[:, None]', 'mask.shape[1]',
         'moe/test_balance.py -k load_balance')),
    'padding taking capacity': (
        ('place', 'jnp.where(@.valid, @, E)', '@.expert',
         'moe/test_placement.py'),
        ('expert_choice', 'jnp.where(mask[..., None], probabilities(logits), -1.0)',
         'probabilities(logits)', 'moe/test_routing.py -k padding')),
    'dropped tokens leaking scaled inputs': (
        ('MoELayer.__call__', 'if self.$shared$:',
         'y = y + jnp.where((y == 0).all(-1, keepdims=True), 0.5 * x, 0)\n    if self.$shared$:',
         'moe/test_layer.py -k dropped'),
        ('dispatch.gather', 'jnp.zeros(x.shape, wide).at', 'x.astype(wide).at',
         'moe/test_dispatch.py -k "hand or equals"')),
    'jitter leaking into expert inputs': (
        ('MoELayer.__call__', "groups = {'x': to_groups(x), ",
         'jitter = self.config.jitter\n    if train and jitter and keys is not None:\n'
         '        x = x * nn.draw_per_example(lambda key, n: jax.random.uniform('
         'key, n, minval=1 - jitter, maxval=1 + jitter), router_keys[0], x.shape)\n'
         "    groups = {'x': to_groups(x), ", 'moe/test_noise.py -k never'),),
    'reported loss including auxiliary losses': (
        ('make_train_step', "'aux_loss': aux_loss}",
         "'aux_loss': aux_loss, 'loss': sums['loss'] + aux_loss * sums['weight']}",
         'train/test_step.py -k reported'),),
    'balance strength changing with devices': (
        ('make_train_step', '.sum(), **model.token_counts(batch)})',
         '.sum()}) | model.token_counts(batch)', 'train/test_parallel.py -k "agrees and pmap"'),
        ('over_groups', 'jax.lax.psum(x, GROUP_AXES)', 'jax.lax.pmean(x, GROUP_AXES)',
         'test_sharding.py -k over_groups')),
    'an MoE of one expert differing from its dense twin': (
        ('routing.probabilities', 'jax.nn.softmax(logits, axis=-1)', 'jax.nn.sigmoid(logits)',
         'moe/test_layer.py -k one_expert'),),
    'mixed dense and MoE stacks failing in surgery': (
        ('upcycle_rules', 'sorted(new - old)', 'sorted(new)',
         'surgery/test_upcycle.py -k already'),),
    'names that fail to match become random': (
        ('rules.plan', "problems['target leaves that nothing makes'].append($",
         "steps.append(_Step(fresh(path), (), path, transforms.Copy('fresh')))",
         'surgery/test_upcycle.py -k misnamed'),
        ('Reader.restore', 'if @:\n        raise', 'if False:\n        raise',
         'checkpoints/test_orbax.py -k difference')),
    'a later key overwriting an earlier one': (
        ('rules.plan', 'if len(made[path]) > 1:', 'if False:', 'trees/test_rules.py -k strict'),
        ('Stack.__init__', "{i:02d}'", "{i % 10:02d}'", 'models/test_build.py -k sizes')),
    'experts from scratch sharing one key': (
        ('_per_expert', 'lambda k: init(k, ', 'lambda k: init(key, ',
         'models/test_layers.py -k experts'),),
    'fan-in over stacked experts': (
        ('_per_expert', 'return lambda key, shape, dtype: $',
         'return lambda key, shape, dtype: init(key, (num_experts, *shape), dtype)',
         'models/test_layers.py -k experts'),),
    'resume picking an unfinished save': (
        ('finished_steps', ' and _finished(d)', '', 'checkpoints/test_orbax.py -k listed'),
        ('orbax._finished', "whole and bool(metadata.get('commit_timestamp_nsecs'))", 'whole',
         'checkpoints/test_orbax.py -k listed')),
    'a damaged file read as it is': (
        ('digests.damage', 'found[name] != expected[name]', 'False',
         'checkpoints/test_digests.py -k guarded'),
        ('digests.damage', 'if saved_as != step:', 'if False:',
         'checkpoints/test_digests.py -k called')),
    'resume losing rng': (
        ('restore', 'state = TrainState($',
         'state = TrainState($\n    '
         'state = dataclasses.replace(state, key=state.key + jnp.uint32(1))',
         'train/test_resume.py -k killed'),),
    'async save errors swallowed': (
        ('Writer.wait', 'self._manager.wait_until_finished()\n    self._manager.check_for_errors()',
         'try:\n        self._manager.wait_until_finished()\n    except Exception:\n        pass',
         'checkpoints/test_orbax.py -k background'),),
    'a test file skipped as a whole': (
        ('tests.trees.test_paths', 'import pytest\n',
         "import pytest\npytest.importorskip('a_package_that_is_not_there')\n",
         'trees/test_paths.py tests/evaluation/test_text_scores.py'),),
    'uniform load taken for health': (
        ('zero_gradient', "if not grad_norm or 'router_grad_norm' not in layer:",
         "if not grad_norm or 'router_grad_norm' not in layer or layer['load_max_over_mean'] < 2:",
         'train/test_router_health.py -k gradient'),
        ('PER_STEP', "('router_grad_norm', 'router_bias_max')", "('router_bias_max',)",
         'train/test_metrics.py')),
    'ragged_dot off TPU': (
        ('moe.grouped_matmul', 'tpu=ragged, cuda=cuda, default=loops', 'default=ragged',
         'moe/test_grouped_matmul.py -k flops'),),
    'three-dimensional activations around matmuls': (
        ('dense', '@ = x.reshape(-1, x.shape[-1])', '@ = x',
         'moe/test_traps.py -k two_dimensional'),),
    'loss-free bias entering the weights': (
        ('top_k', 'weight = jnp.take_along_axis(scores', 'weight = jnp.take_along_axis(ranked',
         'moe/test_token_choice.py -k bias'),),
    'loss-free bias moved by its own batch': (
        ('router.choose', 'score=config.score, bias=bias, **options)',
         'score=config.score, bias=None if bias is None else balance.update_bias(bias, '
         'telemetry.choices_per_expert(routing.top_k(output.logits, mask, config.k, '
         'score=config.score, bias=bias), bias.shape[-1]), config.bias_rate), **options)',
         'moe/test_every.py -k "numpy and bias and drops"'),),
    'loss-free bias moved by local load': (
        ('make_train_step', 'grads, sums = reduce(accumulate($))\n',
         "total = accumulate($)\n        grads, sums = reduce(total)\n"
         "        own = trees.flatten(total[1]['layers'])\n"
         "        choose = lambda path, x: own[path] if path.endswith('/asked') else x\n"
         "        sums['layers'] = trees.map_with_path(choose, sums['layers'])\n",
         'train/test_bias.py -k four'),),
    'carried Adam count over fresh slots': (
        ('fresh_values', 'np.zeros(target_shapes[path].shape, ',
         "np.full(target_shapes[path].shape, 1000 * path.endswith('/count'), ",
         'train/test_initialize.py -k at_most_lr'),
        ('expert_init', 'how if isinstance(how, Subset) else Tile()', 'Tile()',
         'surgery/test_expert_init.py -k fresh_expert')),
    'Drop-Upcycling with independent index sets': (
        ('expert_init._expert', 'axis, seed, own_seed', 'axis, own_seed, own_seed',
         'surgery/test_expert_init.py -k drop'),),
    'granular router columns tiled, not repeated': (
        ('Repeat', '[index[-1]] // self.@', '[index[-1]] % (like.shape[-1] // self.@)',
         'trees/test_transforms.py -k repeat'),),
    'second choices placed before first': (
        ('place', '* K + choice[:, None]', '* K + choice[::-1, None]', 'moe/test_placement.py'),),
    'batch priority ignored': (
        ('moejax.moe', 'priority = probs.max(-1) if config.batch_priority else None',
         'priority = None',
         'moe/test_every.py -k "numpy and batch and priority and drops"'),
        ('place', 'jnp.argsort(-jax.lax', 'jnp.argsort(jax.lax',
         'moe/test_placement.py -k by_priority')),
    'top-p always takes k': (
        ('top_p', '@ = jnp.cumsum(weight, axis=-1) - weight >= p',
         '@ = jnp.zeros_like(weight, bool)', 'moe/test_token_choice.py -k top_p'),),
    "all choices counted in GShard's balance loss": (
        ('load_balance', 'if first_only:', 'if False:', 'moe/test_balance.py -k first'),
        ('moejax.moe', "first_only=config.balance_counts == 'first'", 'first_only=False',
         'moe/test_losses.py -k first')),
    'label smoothing in the reported loss': (
        ('loss_sums', 'loss = log_z - _chosen(logits, target)',
         'loss = smoothed_cross_entropy(logits, target, task.label_smoothing if task else 0.0)',
         'test_losses.py'),),
    'frozen leaves decayed': (
        ('optimizer.update', 'return (param, state)',
         'return ((param * (1 - lr * config.weight_decay)).astype(param.dtype), state)',
         'train/test_parameter_groups.py -k frozen'),),
    'decoding position off by one': (
        ('RelativeBias.row', 'M - 1 - position', 'M - position', 'models/test_attention.py -k row'),
        ('decoding.greedy', 'cache, last, position)', 'cache, last, position + 1)',
         'evaluation/test_decoding.py -k greedy_is')),
    'cache not causal': (
        ('Stack.step', 'jnp.arange(M) <= @', 'jnp.arange(M) < M + 0 * @',
         'evaluation/test_decoding.py -k whole_forward'),),
    'KL of a distillation the wrong way round': (
        ('soft_targets', 'jnp.exp(teacher) * (teacher - student)',
         'jnp.exp(student) * (student - teacher)', 'test_losses.py'),),
    'shared experts scaled by routing weights': (
        ('MoELayer.__call__', 'y = y + self.shared(x, ',
         "p = routing.probabilities(groups['logits']).max(-1).reshape(B, L, 1)\n"
         '        y = y + p * self.shared(x, ', 'moe -k shared'),),
    'dropless padding rows leaking': (
        ('dispatch.grouped', 'keep(keep(out) * weight[:, None])', 'out * weight[:, None]',
         'moe/test_dispatch.py -k hand'),
        ('dispatch.grouped', 'keep(keep(out) * weight[:, None])', 'keep(out * weight[:, None])',
         'moe/test_dispatch.py -k experts_make'),
        ('dispatch.grouped', 'buffer = jnp.where(@.valid[:, None], buffer, 0)', 'pass',
         'moe/test_dispatch.py -k block')),
    'renormalising before the mask': (
        ('top_p', '    weight = jnp.where(@, 0.0, weight)\n', '',
         'moe/test_token_choice.py -k top_p'),),
}

# What this code invites beside them.
OTHERS = {
    'balance loss diluted by a stack that has none': (
        ('moejax.moe', 'if loss_weight:', 'if True:', 'train/test_step.py -k dilute'),),
    'padding counted in the z-loss': (
        ('router_z', 'jnp.where(mask, z ** 2, 0.0)', '(z ** 2)',
         'moe/test_balance.py -k router_z'),),
    'importance of the noisy weights': (
        ('router.losses', 'clean = output.logits if output.clean is None else output.clean',
         'clean = output.logits', 'moe/test_losses.py -k importance'),),
    'router in bfloat16': (
        ('Router.__call__', '_dot(x, self.kernel[...])',
         '_dot(x.astype(jnp.bfloat16), self.kernel[...].astype(jnp.bfloat16))',
         'moe/test_layer.py -k rounded'),),
    'noise in evaluation': (
        ('MoELayer', 'None if keys is None or not train else', 'None if keys is None else',
         'moe/test_noise.py -k evaluation'),),
    'second expert always used': (
        ('router.choose', 'if output.uniform is not None:', 'if False:',
         'moe/test_noise.py -k second'),),
    'evaluation with the capacity of training': (
        ('moejax.moe', '@ if train else @.eval_capacity_factor', '@',
         'moe/test_layer.py -k dropped'),),
    'expert choice in a decoder': (
        ('T5Config', 'check(self.decoder_moe.router in CAUSAL, ', 'check(True, ',
         'models/test_t5.py -k refused'),),
    'decoding drops tokens': (
        ('MoELayer', 'S if no_drop else ', '', 'moe/test_causal.py'),),
    'empty slots leaking': (
        ('dispatch.gather', 'jnp.where(routing.valid.reshape(G, E * C, 1), buffers, 0)', 'buffers',
         'moe/test_dispatch.py -k empty'),),
    'slots added up in bfloat16': (
        ('dispatch.gather', 'jnp.zeros(x.shape, wide).at[group, index].add(out)',
         'jnp.zeros_like(x).at[group, index].add(out.astype(x.dtype))',
         'moe/test_dispatch.py -k many_slots'),),
    'many small matmuls': (
        ('PIECES', '(8, 4, 2, 1)', '(1,)', 'moe/test_grouped_matmul.py -k pieces'),
        ('moejax.moe', 'first, count = (first + times * m, ', 'first, count = (first, ',
         'moe/test_grouped_matmul.py -k pieces')),
    'GPU kernels past the last run': (
        ('grouped_matmul_gpu', 'jnp.where(expert < len(blocks), $, 0)',
         'jnp.full_like(expert, $)', 'moe/test_grouped_matmul_gpu.py -k numpy'),
        ('grouped_matmul_gpu', '(ends - blocks * ', '(ends - (blocks - 1) * ',
         'moe/test_grouped_matmul_gpu.py -k numpy')),
    'sums in bfloat16 on a GPU': (
        ('grouped_matmul_gpu', 'steps[block], step, jnp.zeros($, jnp.float32)',
         'steps[block], lambda i, t: step(i, t).astype(x.dtype), jnp.zeros($, x.dtype)',
         'moe/test_grouped_matmul_gpu.py -k bfloat16'),),
    'tiles too wide for a GPU': (
        ('grouped_matmul_gpu', 'if fits_wide and ', 'if ',
         'moe/test_grouped_matmul_gpu.py -k shared_memory'),),
    'a kernel that varies over nothing': (
        ('grouped_matmul_gpu', ', manual_axis_type=jax.typeof(like).manual_axis_type', '',
         'moe/test_grouped_matmul_gpu.py -k shard_map'),),
    'loops on a GPU': (
        ('moe.grouped_matmul', 'if not grouped_matmul_gpu.fits(x, b, *w.shape):', 'if True:',
         'moe/test_grouped_matmul_gpu.py -k kernels_where'),),
    'norms over two axes': (
        ('layers', 'x.reshape(-1, x.shape[-1]).astype(', 'x.astype(',
         'moe/test_traps.py -k norms_scale'),),
    'experts computed again': (
        ('REMAT', ', @.EXPERT_MATMULS', '', 'models/test_scan.py -k experts'),),
    'tokens sent again': (
        ('sharding.exchange', 'checkpoint_name(x, @)', 'x',
         'aot/test_expert_parallel.py -k sends_again'),),
    'gathering the batch over the mesh': (
        ('by_example', 'if shards == 1 or x.shape[0] % shards:', 'if True:',
         'aot/test_expert_parallel.py -k grows'),
        ('moejax.models', 'x = sharding.by_example(x)\n$auxes.append', 'auxes.append',
         'aot/test_expert_parallel.py -k nor_in')),
    'gradients of all tokens sent to the parts of an embedding': (
        ('Embed', 'sharding.@(self.embedding[...])', 'self.embedding[...]',
         'aot/test_expert_parallel.py -k "nothing_that_grows and paper"'),),
    'averaging identical experts inexactly': (
        ('Mean', 'first + total / len(arrays[0])',
         'np.mean(np.asarray(arrays[0][slice(None), *index], like.dtype), 0)',
         'trees/test_transforms.py -k mean'),),
    'one update over all stacked experts': (
        ('EXPERTS', '/experts/', '/none/', 'train/test_optimizer.py -k separate'),),
    'stacked leaves updated as one': (
        ('optimizer.update', 'if stacked:', 'if False:', 'train/test_scan.py -k block_by_block'),),
    'scanned blocks out of order': (
        ('stacking.stack', 'for member in members(path)]', 'for member in members(path)][::-1]',
         'trees/test_stacking.py'),),
    'clipping before the reduction': (
        ('make_train_step', 'grads, sums = reduce(accumulate($))\n',
         'total = accumulate($)\n        grads, sums = reduce((optimizer.clip_by_global_norm('
         'total[0], settings.optimizer.clip_norm)[0], total[1]))\n',
         'train/test_step.py -k clipping'),),
    'resume repeating data': (
        ('train.loop', 'for batch in @.train_batches(done):',
         'for batch, _ in zip(@.train_batches(plan.first), range(plan.end - done)):',
         'train/test_resume.py -k killed'),),
    'steps of one call with rows of others': (
        ('train.step', '.swapaxes(0, 1).reshape(-1, ', '.reshape(-1, ',
         'train/test_steps_per_call.py -k "cut or rows"'),
        ('Plan.make', 'check(plan.whole % (config.steps_per_call or 1) == 0, ', 'check(True, ',
         'train/test_steps_per_call.py -k middle')),
    'several steps at once after a resume in between': (
        ('Plan', 'math.gcd(self.first, self.done, ', 'math.gcd(self.first, ',
         'train/test_plan.py -k resumed'),),
    'training on after it has diverged': (
        ('check_finite', 'check(math.isfinite(value), ', 'check(True, ',
         'train/test_router_health.py -k diverges'),),
    'memory of all devices taken for one': (
        ('train.memory', 'math.prod(leaf.sharding.shard_shape(leaf.shape))',
         'math.prod(leaf.shape)', 'train/test_memory.py'),),
    'an evaluation not counted': (
        ('memory._phases', 'if config.data.eval_batch_size > examples or more_slots:', 'if False:',
         'train/test_memory.py -k evaluation'),),
    'out of memory at the last step': (
        ('Forecast', "'decoding': self.decoding", "'decoding': 0",
         'train/test_memory.py -k beams'),),
    'a teacher nobody counts': (
        ('Forecast', ' + self.optimizer + self.teacher', ' + self.optimizer',
         'train/test_teacher.py -k parameters'),
        ('Teacher.__init__', "self.outputs = {'teacher_logits$",
         "self.outputs = {'teacher_logits$\n    self.restore()",
         'train/test_teacher.py -k reads_nothing')),
    'page faults at every step': (
        ('keep_freed', 'TRIM_THRESHOLD: NEVER', 'TRIM_THRESHOLD: MOST',
         'train/test_malloc.py -k gigabytes'),
        ('free_large', ' or ROOM * needed <= available', '', 'train/test_malloc.py -k room')),
    'three times its forecast': (
        ('train.loop', 'malloc.free_large($', 'pass', 'train/test_malloc.py -k needs'),),
    'a scan body counted once': (
        ('hlo', ', times * self._length(instruction))', ', times)', 'aot/test_hlo.py'),),
    'memory traffic left out of the estimate': (
        ('hlo', 'far(instruction.arrays[:2])', 'far(instruction.arrays[:1])',
         'aot/test_hlo.py -k hbm'),),
    'communication left out of the estimate': (
        ('groups_of', 'raise ValueError($', 'return np.zeros((1, 1))',
         'aot/test_hlo.py -k known'),),
    'a slice taken for a torus': (
        ('network', 'rings = tuple((size == 16 for size in shape))', 'rings = (True,) * len(shape)',
         'aot/test_network.py'),),
    "work of the hardware counted as the model's": (
        ('flops', 'hot = dispatch and ', 'hot = ', 'test_flops.py -k utilisation'),),
    'processes stopping at different steps': (
        ('Hosts.stop', 'if len(@) > AHEAD else', 'if signal else',
         'processes/test_processes.py -k agree'),),
    'processes loading rows of others': (
        ('host_of', 'return (int(@[process][0]) // size, shards // size)',
         'return (process, len(@))', 'processes/test_processes.py -k across'),),
    'waiting for a process that is gone': (
        ('Watchdog._follow', 'if process is None:\n$\n    else:', 'if False:',
         'cluster/test_watchdog.py -k dies'),),
    'an error that ends as an abort': (
        ('Watchdog', 'time.sleep(grace + LAST)', 'time.sleep(LAST)',
         'cluster/test_watchdog.py -k reaches'),),
    'verdicts on part of the pairs': (
        ('experiments.verdict', '_outcome(claim, differences, planned, p, q)',
         '_outcome(claim, differences, 0 if len(records) >= planned else planned, p, q)',
         'experiments/test_verdict.py -k waits'),),
    'stopping as soon as it is significant': (
        ('experiments.verdict', '@.n < planned', 'False',
         'experiments/test_verdict.py -k before'),),
}
