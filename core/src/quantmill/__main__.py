"""``python -m quantmill``: the command line, for launchers such as ``torchrun -m quantmill``."""

from quantmill.cli import main

if __name__ == "__main__":
    main()
