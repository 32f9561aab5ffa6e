"""Only the fine-tuning, of every task whose training pairs are there.

ray job submit --working-dir . -- python jobs/train.py configs/paper.yaml [key=value …]
"""

from selfguide_ray.method import main, plan, train

if __name__ == "__main__":
    main(__doc__, [plan, train])
