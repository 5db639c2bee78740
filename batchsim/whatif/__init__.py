"""What a learned loop would do under other schedules."""

from batchsim.whatif.answer import Answer, Prediction, whatif

__all__ = ["Answer", "Prediction", "whatif"]
