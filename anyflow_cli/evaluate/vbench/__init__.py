"""VBench and VBench-I2V: what they measure here, driven in an environment of their own.

``dimensions`` says what is measured and how it is summed, ``published`` what others got.
"""
