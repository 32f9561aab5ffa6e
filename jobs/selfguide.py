"""The whole method over all tasks of a config; submit the same job again to continue it.

ray job submit --working-dir . -- python jobs/selfguide.py configs/paper.yaml [key=value …]
"""

from selfguide_ray.method import main, plan, report, synthesize, train_and_evaluate

if __name__ == "__main__":
    main(__doc__, [plan, synthesize, train_and_evaluate, report])
