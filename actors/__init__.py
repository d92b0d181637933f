"""The classes made remote, as the command line hands them to the driver. All behaviour lives in `ray_ministral`."""

from ray_ministral.driver.stage_actor import stage_actor_class
from ray_ministral.driver.train_actor import train_actor_class

StageActor = stage_actor_class()
TrainActor = train_actor_class()

__all__ = ["StageActor", "TrainActor"]
