"""`python -m lmd_hf` is `lmd-hf`."""

from lmd_hf.cli import main


if __name__ == "__main__":
    main()
