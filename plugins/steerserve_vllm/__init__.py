"""steerserve inside stock vLLM: the only package that imports vllm.

`register` is the `vllm.general_plugins` entry point; vLLM calls it in every process it starts.
"""

from __future__ import annotations

__all__ = ["register"]

_registered = False


def register() -> None:
    """Wrap vLLM's seams. Harmless when called again, and without a configuration nothing changes.

    A vLLM that the wrappers were not written for is left as it is, and refuses to start with a `steerserve`
    configuration: steering is never half there.
    """
    global _registered
    if _registered:
        return
    from steerserve.errors import IncompatibleError

    from . import admission, compile_key, driver, ending, prefix_cache, runner_v1, seams, seeds, worker

    driver.follow_driver()
    _registered = True
    try:
        seams.check()
    except IncompatibleError as error:
        seams.refuse_configuration(error)
        return
    admission.install()
    prefix_cache.install()
    compile_key.install()
    runner_v1.install()
    seeds.install()
    ending.install()
    worker.install()
