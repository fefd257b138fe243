"""Betty's names over mlopt: change the imports, keep the script.

    from mlopt.compat.betty import Config, Engine, EngineConfig, Env, ImplicitProblem

Betty (arXiv 2207.02849) versions 0.1 and 0.2. A script gives the results it gives there where Betty is right; where it
is not, mlopt does the right thing, and a `BettyWarning` says once what differs. ``docs/betty.md`` has the list.

Owns names and signatures, and how they map onto `mlopt.Problem`, estimators and `mlopt.Engine`; nothing is computed
here.
"""

from mlopt.compat.betty.configs import BettyWarning, Config, EngineConfig
from mlopt.compat.betty.engine import Engine
from mlopt.compat.betty.env import Env
from mlopt.compat.betty.problems import ImplicitProblem, IterativeProblem, Problem

__all__ = [
    "BettyWarning",
    "Config",
    "Engine",
    "EngineConfig",
    "Env",
    "ImplicitProblem",
    "IterativeProblem",
    "Problem",
]
