"""The tests: a folder for each room of the package, and tests/harness for what several rooms' tests need."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
