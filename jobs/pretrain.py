"""Train the embedded student from scratch.

python jobs/pretrain.py NATURAL_INSTRUCTIONS_DIR OUTPUT_DIR [minutes]
"""

import logging
import sys
from pathlib import Path

from selfguide_ray.pretraining import Recipe, pretrain

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    source, output, minutes = Path(sys.argv[1]), Path(sys.argv[2]), float((*sys.argv, 30)[3])
    print(pretrain(source / "tasks.tar.xz", source / "splits", output, Recipe(minutes=minutes)))
