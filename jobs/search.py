"""Search for settings: a grid of points on validation instances, which share every table that they can; then the choice.

ray job submit --working-dir . -- python jobs/search.py configs/search.yaml [key=value …]
"""

from selfguide_ray.method import entry
from selfguide_ray.search.command import search

if __name__ == "__main__":
    entry(__doc__, search)
