"""A model of fixed k to teach a policy of counts afterwards: the routing study's, with 4 of 16 experts.

    python -m experiments.train --config=configs/retrofit.py --workdir=runs/fixed

The argument is the routing study's size: cpu (the default) or smoke.
"""

from configs import routing_study


def get_config(arg=None):
  config = routing_study.get_config(arg or "cpu")
  config.routing.method = "topk"
  config.routing.k = 4
  return config
