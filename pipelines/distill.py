"""Distil a data set as a Ray job: ray job submit --working-dir . -- python pipelines/distill.py RECIPE [options].

The same as `teddy-ray distill RECIPE [options]`.
"""

import sys

from teddy_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
