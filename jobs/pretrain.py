"""The embedded student, trained from scratch on Natural Instructions' default train split.

ray job submit --working-dir . -- python jobs/pretrain.py NATURAL_INSTRUCTIONS OUTPUT [minutes]
"""

import logging
import sys
from pathlib import Path

from selfguide_ray.pretraining import Recipe, pretrain

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    source, output, minutes = (*sys.argv[1:4], "30")[:3]
    recipe = Recipe(minutes=float(minutes))
    print(pretrain(Path(source) / "tasks.tar.xz", Path(source) / "splits", Path(output), recipe))
