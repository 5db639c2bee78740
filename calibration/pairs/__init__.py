"""Loops of many kinds, each written twice: synchronously, as one writes it first, and asynchronously, as an engineer
who knows streams and events does. Both compute the same, so their step times show what asynchrony gave.

python -m calibration.pairs run --out DIR [--set fit|test] [--only NAME] [--rounds N]
"""
