"""An embedded student, trained from scratch on Natural Instructions' default train split.

ray job submit --working-dir . -- python jobs/pretrain.py configs/student-nano.yaml [key=value ...]
"""

from selfguide_ray.method import entry
from selfguide_ray.pretraining.command import pretrain

if __name__ == "__main__":
    entry(__doc__, pretrain)
