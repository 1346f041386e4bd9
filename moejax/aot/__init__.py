"""Compiles programs for TPUs that are not there, and reads what they cost.

chips.py: TPU chips and slices. hlo.py: the text of a program. collectives.py: its communication.
network.py: the time of communication. report.py: a step's memory, communication, estimated time.
"""
