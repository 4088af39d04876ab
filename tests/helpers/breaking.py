"""Faults, put into a model on purpose."""

import deit_fast


def wrong_mlps(monkeypatch, factor):
    real = deit_fast.layers.Mlp.branch

    def wrong(*args, **kwargs):
        found = real(*args, **kwargs)
        return (factor * found[0], None) if isinstance(found, tuple) else factor * found

    monkeypatch.setattr(deit_fast.layers.Mlp, "branch", wrong)
