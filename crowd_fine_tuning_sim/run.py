"""Crowd fine-tuning: people who hold texts are grouped, each group tunes a variant of a language model on its members'
texts, the best variant becomes the model, and all are paid in points. Do the points agree with Shapley values of the
game in which the model is really retrained on every coalition?

python crowd_fine_tuning_sim/run.py                       six simulated people, all 64 coalitions
python crowd_fine_tuning_sim/run.py --preset quick        a minute's trial
python crowd_fine_tuning_sim/run.py --crowd chitchat --target-emotion curiosity --dry-run
"""

import sys

from crowd_fine_tuning_sim.settings import PRESETS, Settings
from experiment.command_line import run_script

if __name__ == "__main__":
    sys.exit(run_script("crowd_fine_tuning_sim.main", Settings, PRESETS, __doc__))
