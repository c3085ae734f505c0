"""Numbers of experts E = K with perfectly even loads at which the collapse alarm is raised."""

import numpy as np
from moe.routing import analysis

print(
  "false alarms at E = K <= 256, even load:",
  [e for e in range(1, 257) if analysis.collapsed_layers(np.full((1, e), 7), e)][:12],
  sum(bool(analysis.collapsed_layers(np.full((1, e), 7), e)) for e in range(1, 257)),
)
