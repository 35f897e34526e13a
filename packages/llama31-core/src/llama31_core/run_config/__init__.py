"""The YAML files of runs: a file and `section.key=value` overrides in, a typed `RunConfig` out.

Sections and keys have MindFormers' names, so its files load. A key of theirs that means nothing here is named, with the
reason, in one warning; any other unknown key is an error.
"""

from llama31_core.run_config.load import load_any_config, load_predict_config, load_run_config
from llama31_core.run_config.model_section import ModelSection
from llama31_core.run_config.run import PredictConfig, RunConfig

__all__ = ["ModelSection", "PredictConfig", "RunConfig", "load_any_config", "load_predict_config", "load_run_config"]
