"""Sweep a recipe as a Ray job: ray job submit --working-dir . -- python pipelines/sweep.py RECIPE [options].

The same as `teddy-ray sweep RECIPE [options]`.
"""

import sys

from teddy_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
