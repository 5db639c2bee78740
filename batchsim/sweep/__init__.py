"""Many variants of one scenario: which ones, run on processes or a Ray cluster, one result file each."""
