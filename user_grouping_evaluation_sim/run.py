"""Simulate a crowd from genre preferences, group it, judge candidates, pay points, check the points by Shapley values.

Writes figures (.png, .pdf) and tables (.csv) to the run's folder. Groupings, metrics and scorings are named, or your
own as module:function.
"""

import sys

from experiment.command_line import run_script
from user_grouping_evaluation_sim.settings import PRESETS, Settings

if __name__ == "__main__":
    sys.exit(run_script("user_grouping_evaluation_sim.main", Settings, PRESETS, __doc__))
