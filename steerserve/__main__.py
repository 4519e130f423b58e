"""`python -m steerserve`; for torchrun: `torchrun --nproc-per-node 8 -m steerserve train run.yaml`."""

from .cli import main

if __name__ == "__main__":
    main()
