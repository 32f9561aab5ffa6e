"""Only the report, of whatever tables are there.

ray job submit --working-dir . -- python jobs/report.py configs/paper.yaml [key=value …]
"""

from selfguide_ray.method import main, plan, report

if __name__ == "__main__":
    main(__doc__, [plan, report])
