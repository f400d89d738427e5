"""Which worker goes to which node: worked out before anything is started. Without Ray.

needs   what every role asks for        nodes   what there is, described in a file or told by Ray
fit     the one into the other, or what is missing
"""
