"""Data side of the zoo: converters of anybody's files to tar shards, and the loader of such shards.

The converters lie in ``converters/`` and keep their short names as commands: ``python -m data_pipelines.coco``.
"""

from pathlib import Path

__path__.append(str(Path(__file__).parent / "converters"))
