"""Learning rates by hand: curves, the three starts of a run with a parent, cooldowns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.train.schedule import STARTS, ScheduleConfig, schedule

CURVES = ('rsqrt', 'constant', 'cosine')
FLAT = dict(warmup_steps=4, timescale=16)

SCHEDULES = {
    # peak 2; warm-up 4: 2 * 1/4, flat until 16, then 2 * sqrt(16/64) = 1, 2 * sqrt(16/100) = 0.8
    'rsqrt': (ScheduleConfig('rsqrt', **FLAT), 0, 1000,
              {0: 0.0, 1: 0.5, 4: 2.0, 16: 2.0, 64: 1.0, 100: 0.8}),
    # T5's 1 / sqrt(max(t, 10000)) with peak 2 for 0.01: 2 at 10000, 1 at 40000
    't5': (ScheduleConfig('rsqrt', warmup_steps=0, timescale=10000), 0, 50000,
           {0: 2.0, 9999: 2.0, 10000: 2.0, 40000: 1.0}),
    # the first from 64 to 136, its last 36 steps cooling to 1/2: at 100 still 0.8, at 118
    # 1/2 + 1/2 * 18/36 = 3/4 of 2 * sqrt(16/118), at 136 and after 1/2 of 2 * sqrt(16/step)
    'cooldown': (ScheduleConfig('rsqrt', **FLAT, cooldown_steps=36, cooldown_to=0.5), 64, 136,
                 {64: 1.0, 100: 0.8, 118: 2 * (16 / 118) ** 0.5 * 3 / 4,
                  136: (16 / 136) ** 0.5, 999: (16 / 999) ** 0.5}),
    # to 0: at 15 of 10..20 half, at the end nothing
    'constant': (ScheduleConfig('constant', warmup_steps=2, cooldown_steps=10), 0, 20,
                 {1: 1.0, 2: 2.0, 10: 2.0, 15: 1.0, 20: 0.0}),
    # warm-up 2, then 8 steps of cosine from 2 to 2 * 1/4: half-way (2 + 1/2) / 2 = 5/4
    'cosine': (ScheduleConfig('cosine', warmup_steps=2, final_fraction=0.25), 0, 10,
               {0: 0.0, 1: 1.0, 2: 2.0, 6: 1.25, 10: 0.5, 11: 0.5}),
    # the same from a parent's step 100: counted from there
    'cosine restarts': (ScheduleConfig('cosine', 'restart', warmup_steps=2, final_fraction=0.25),
                        100, 110, {100: 0.0, 102: 2.0, 106: 1.25, 110: 0.5}),
    # rsqrt from 64 is 1 there; once more from 0: at 65 1/4 of 2 * sqrt(16/65), at 66 1/2 of
    # 2 * sqrt(16/66), from 68 the parent's curve
    'rewarm': (ScheduleConfig('rsqrt', 'rewarm', **FLAT), 64, 1000,
               {64: 0.0, 65: 2 / 65 ** 0.5, 66: 4 / 66 ** 0.5, 68: 8 / 68 ** 0.5, 100: 0.8}),
    'rewarmed constant': (ScheduleConfig('constant', 'rewarm', warmup_steps=4), 10, 30,
                          {10: 0.0, 11: 0.5, 13: 1.5, 14: 2.0, 29: 2.0}),
    # a run that begins at 2, half-way through its parent's warm-up of 4: at 3 both hold,
    # 2 * 3/4 * 1/4; at 5 the parent's is over, 2 * 3/4
    'rewarm in a warm-up': (ScheduleConfig('constant', 'rewarm', warmup_steps=4), 2, 30,
                            {2: 0.0, 3: 0.375, 5: 1.5, 6: 2.0}),
    # rsqrt from 64 as if from 0: flat until 64 + 16, at 64 + 64 half the peak; the cooldown of 72
    # from 128 to 200 is measured from the end all the same, at 64 + 100 half of 0.8
    'restart': (ScheduleConfig('rsqrt', 'restart', **FLAT, cooldown_steps=72), 64, 200,
                {64: 0.0, 65: 0.5, 68: 2.0, 80: 2.0, 128: 1.0, 164: 0.4, 200: 0.0}),
    # rewarm and cooldown in one run, 100 to 108: at 102 half-way up, at 106 half-way down
    'rewarm and cooldown': (ScheduleConfig('constant', 'rewarm', warmup_steps=4, cooldown_steps=4),
                            100, 108, {100: 0.0, 102: 1.0, 104: 2.0, 106: 1.0, 108: 0.0}),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedule_by_hand(name):
  config, start, end, table = SCHEDULES[name]
  rate = schedule(config, 2.0, start_step=start, end_step=end)
  for step, value in table.items():
    given = rate(jnp.int32(step))
    assert given.dtype == jnp.float32 and given.shape == ()
    np.testing.assert_allclose(given, value, rtol=1e-6, err_msg=f'step {step}')


@pytest.mark.parametrize('name', CURVES)
@pytest.mark.parametrize('start', STARTS[1:])
def test_from_scratch_every_start_is_the_same(name, start):
  def rates(start):
    config = ScheduleConfig(name, start, warmup_steps=8, timescale=16,
                            cooldown_steps=0 if name == 'cosine' else 20)
    return np.asarray(jax.vmap(schedule(config, 2.0, start_step=0, end_step=60))(jnp.arange(61)))
  np.testing.assert_array_equal(rates(start), rates('continue'))
  assert rates(start)[4] == 1.0 and rates(start)[8] == 2.0   # one warm-up, not two


@pytest.mark.parametrize('make, message', [
    (lambda: ScheduleConfig(name='linear'), 'schedule.name'),
    (lambda: ScheduleConfig(start='warm'), "schedule.start: got 'warm'.*Did you mean 'rewarm'"),
    (lambda: ScheduleConfig(start='rewarm', warmup_steps=0), 'schedule.warmup_steps: got 0'),
    (lambda: ScheduleConfig(warmup_steps=-1), 'schedule.warmup_steps: got -1'),
    (lambda: ScheduleConfig(timescale=0), 'schedule.timescale'),
    (lambda: ScheduleConfig(cooldown_to=2.0), 'schedule.cooldown_to'),
    (lambda: ScheduleConfig('cosine', cooldown_steps=1), 'final_fraction'),
    (lambda: schedule(ScheduleConfig(), 1.0, start_step=5, end_step=5), 'config.steps'),
    (lambda: schedule(ScheduleConfig(cooldown_steps=11), 1.0, start_step=5, end_step=15),
     'schedule.cooldown_steps: got 11, allowed: at most the 10'),
    *((lambda start=start: schedule(ScheduleConfig('cosine', start), 1.0, start_step=5,
                                    end_step=15),
       f"schedule.start: got '{start}', allowed: 'restart' for a cosine that starts at .* step 5")
      for start in ('continue', 'rewarm'))])
def test_errors(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
