"""An embedded student, trained from scratch on Natural Instructions' default train split.

ray job submit --working-dir . -- python jobs/pretrain.py configs/student-nano.yaml [key=value ...]
"""

import sys

from selfguide_ray.method import guarded
from selfguide_ray.pretraining.command import pretrain

if __name__ == "__main__":
    sys.exit(guarded(lambda: pretrain(sys.argv[1:], __doc__)))
