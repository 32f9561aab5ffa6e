"""One thing changed at a time, over several seeds, in runs that share every table that they can; then the comparison.

ray job submit --working-dir . -- python jobs/ablation.py configs/ablation.yaml [key=value …]
"""

from selfguide_ray.method import entry
from selfguide_ray.search.ablation import ablate

if __name__ == "__main__":
    entry(__doc__, ablate)
