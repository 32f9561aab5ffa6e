"""Only the training data: the student writes inputs, answers them, and the pairs are filtered.

ray job submit --working-dir . -- python jobs/synthesize.py configs/paper.yaml [key=value …]
"""

from selfguide_ray.method import main, plan, synthesize

if __name__ == "__main__":
    main(__doc__, [plan, synthesize])
