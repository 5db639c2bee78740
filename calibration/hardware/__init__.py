"""Executions on other hardware: fewer multiprocessors, busier hosts, several devices."""
