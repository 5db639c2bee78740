"""Everything that touches a GPU: measuring it, running scenarios on it, comparing with predictions.

Imports batchsim; batchsim never imports this package except at its command line.
"""
