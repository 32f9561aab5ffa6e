"""Search for settings: a grid of points on validation instances, which share every table that they can; then the choice.

ray job submit --working-dir . -- python jobs/search.py configs/search.yaml [key=value …]
"""

import sys

from selfguide_ray.method import guarded
from selfguide_ray.search.command import search

if __name__ == "__main__":
    sys.exit(guarded(lambda: search(sys.argv[1:], __doc__)))
