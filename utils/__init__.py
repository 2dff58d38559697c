"""All that is neither a network nor a script, in packages on floors; imports point downwards.

6  evaluation, export
5  inference
4  runs
3  training
2  annotation, modeling
1  data
0  system, config, metrics
"""
