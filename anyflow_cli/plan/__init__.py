"""What a run will cost, from its recipe alone: no weight is downloaded, and no tensor has storage.

Objectives declare their network calls (``train/objectives.py``); the plan measures the heaviest of each kind
on the real network with torch's fake tensors, and adds and multiplies.
"""
