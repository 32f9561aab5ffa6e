"""Only predictions and scores, of every shard whose tasks are trained, and the report.

ray job submit --working-dir . -- python jobs/evaluate.py configs/paper.yaml [key=value …]
"""

from selfguide_ray.method import evaluate, main, plan, report

if __name__ == "__main__":
    main(__doc__, [plan, evaluate, report])
