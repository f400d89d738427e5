"""The learner: DeepSpeed engines for policy and critic, one rank per process; no Ray in here.

`LearnerRank` turns scored groups into optimizer updates; `Learner` holds the engines; an update whose gradient is not
finite is applied on no rank.
"""
