"""steerserve inside stock vLLM: the only package that imports vllm.

`register` is the `vllm.general_plugins` entry point; vLLM calls it in every process it starts.
"""

from __future__ import annotations

__all__ = ["register"]

_registered = False


def register() -> None:
    """Wrap vLLM's seams. Harmless when called again, and without a configuration nothing changes.

    Raises: IncompatibleError before anything is wrapped, if this vLLM is not one the wrappers were written
    for.
    """
    global _registered
    if _registered:
        return
    from . import admission, launcher, prefix_cache, runner_v1, seams, worker

    seams.check()
    admission.install()
    prefix_cache.install()
    runner_v1.install()
    worker.install()
    launcher.install()
    _registered = True
