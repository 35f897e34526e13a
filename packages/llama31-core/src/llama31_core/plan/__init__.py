"""What a run will need and how fast it should be, from its file alone: no MindSpore, no weights, no devices."""

from llama31_core.plan.hardware import DEVICES, Device, find_device
from llama31_core.plan.prediction import PredictionPlan, plan_prediction
from llama31_core.plan.training import TrainingPlan, plan_training
from llama31_core.plan.workload import PredictWorkload, TrainWorkload

__all__ = [
    "DEVICES",
    "Device",
    "PredictWorkload",
    "PredictionPlan",
    "TrainWorkload",
    "TrainingPlan",
    "find_device",
    "plan_prediction",
    "plan_training",
]
