"""Point in space: does a language model, tuned on comments near a point in emotion space, come to write such comments?
And do competing variants come closer than a single model?

python point_in_space_sim/run.py                           one emotion (joy), all protocols and controls
python point_in_space_sim/run.py --preset quick            a minute's trial
python point_in_space_sim/run.py --preset all --dry-run    what 28 emotions would take
"""

import sys

from experiment.command_line import run_script
from point_in_space_sim.settings import PRESETS, Settings

if __name__ == "__main__":
    sys.exit(run_script("point_in_space_sim.main", Settings, PRESETS, __doc__))
