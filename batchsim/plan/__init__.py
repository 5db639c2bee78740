"""The cheapest hardware, replicas, schedule and batch limit that meet objectives, as surely as is wanted."""

from batchsim.plan.answer import plan, solve
from batchsim.plan.configurations import Problem, problem_of
from batchsim.plan.result import Change, PlanResult
from batchsim.plan.spec import Plan, read

__all__ = ["Change", "Plan", "PlanResult", "Problem", "plan", "problem_of", "read", "solve"]
