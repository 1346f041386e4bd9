"""Compiles programs for TPUs that are not there, and reads what they cost.

chips.py: TPU chips and slices. hlo.py: the text of a program. collectives.py: its communication.
network.py: the time that takes. report.py: memory, communication and an estimate of a step.
"""
