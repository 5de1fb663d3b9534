"""Speed of a recipe's networks on this machine, beside diffusers' classes and the hardware's own limits."""
