"""python -m stable_openai: the same as the command stable-openai."""

import sys

from stable_openai.cli import main

if __name__ == "__main__":  # multiprocessing imports this module in every process that it spawns
    sys.exit(main())
