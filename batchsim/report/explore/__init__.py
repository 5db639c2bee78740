"""Many runs on one page: a table to sort and filter, a frontier, a map over two fields, latencies, and timelines.

What is here knows rows and columns only; `batchsim.report.sweep` and `batchsim.report.plan` say which.
"""
