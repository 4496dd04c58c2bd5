"""``python -m ftd_lightning`` is ``ftd``."""

from ftd_lightning.cli import main

if __name__ == "__main__":
    main()
