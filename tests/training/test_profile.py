"""Traces of training steps."""

from robustprune_jax import pipeline


def test_the_steps_that_are_named_are_traced(tiny_config, tmp_path):
    config = tiny_config()
    config.arch, config.objective, config.phases = 'lin_1', 'natural', 'pretrain'
    config.pretrain.epochs, config.profile = 1, '2:3'
    pipeline.run(config, tmp_path)
    (trace,) = (tmp_path / 'pretrain/profile').rglob('*.xplane.pb')
    assert trace.stat().st_size > 0
    config.pretrain.epochs, config.profile = 1, '9:10'  # steps that the phase does not have
    pipeline.run(config, tmp_path / 'short')
    assert not list((tmp_path / 'short').rglob('*.xplane.pb'))
